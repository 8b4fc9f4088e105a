"""The noise of one request: draws of any number of images first, then the same shape again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator

__all__ = ["NoiseStream"]

F32 = NDArray[np.float32]


class NoiseStream:
    """Standard normal noise without end, float32 of ``shape``.

    Args:
        seeds: One for the batch, or one for each image, whose noise then does not depend on the other images.
        shape: Of the latents, (images, C, h, w).
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...]):
        self._generators = [TorchGenerator(seed) for seed in seeds]
        self._shape = shape
        own = shape if len(seeds) == 1 else (1, *shape[1:])
        self._streams = [generator.endless(own) for generator in self._generators]

    @property
    def separate(self) -> bool:
        """True if each image has a stream of its own."""
        return len(self._generators) > 1

    def draw(self, images: int) -> F32:
        """Draw noise float32 [images, C, h, w], before the first ``next``.

        Raises:
            SpecError: The images have streams of their own, and there are not so many.
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
