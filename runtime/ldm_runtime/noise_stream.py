"""The noise of one request: draws for any number of images first, then endless draws of one shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator

__all__ = ["NoiseStream"]

F32 = NDArray[np.float32]


class NoiseStream:
    """Endless iterator of standard normal noise, float32 of ``shape``.

    Args:
        seeds: One seed for the batch, or one for each image, so that its noise does not depend on the other images.
        shape: Shape of the latents, (images, C, h, w).
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]):
        self._generators = [TorchGenerator(seed) for seed in seeds]
        self._shape = shape
        own = shape if len(seeds) == 1 else (1, *shape[1:])
        self._streams = [generator.endless(own) for generator in self._generators]

    @property
    def separate(self) -> bool:
        """True if each image has its own stream."""
        return len(self._generators) > 1

    def draw(self, images: int) -> F32:
        """Draw noise float32 [images, C, h, w]; call it before the first ``next``.

        Raises:
            SpecError: Each image has its own stream, and there is another number of streams.
        """
        if not self.separate:
            return self._generators[0].randn((images, *self._shape[1:]))
        if images != len(self._generators):
            raise SpecError(f"noise: got {images} images, expected {len(self._generators)}, one for each seed")
        return np.concatenate([generator.randn((1, *self._shape[1:])) for generator in self._generators])

    def __iter__(self) -> Iterator[F32]:
        return self

    def __next__(self) -> F32:
        return np.concatenate([next(stream) for stream in self._streams])
