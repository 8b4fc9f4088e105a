"""Results of a pipeline: finished denoising steps, and the images of a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.images import to_pil

__all__ = ["Generation", "Step"]

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Step:
    """One finished denoising step.

    Attributes:
        index, total: Index from 0, and the number of steps.
        timestep: Training timestep; a whole number unless the scheduler has fractional ones.
        read: Function that returns the latents. On a device it is only valid until the next step.
    """

    index: int
    total: int
    timestep: float
    read: Callable[[], F32]

    @cached_property
    def latents(self) -> F32:
        """The latents after this step, float32 [B, C, h, w]. Read them before the next step."""
        return self.read()


@dataclass(frozen=True, eq=False)
class Generation:
    """Result of a call.

    Attributes:
        arrays: Images float32 [B, channels, H, W] in [0, 1]; images of one prompt are adjacent.
        latents: float32 [B, C, h, w].
        flagged: For each image, True if the safety checker flagged it and made it black. None without a safety checker.
    """

    arrays: F32
    latents: F32
    flagged: tuple[bool, ...] | None = None

    def __repr__(self) -> str:
        """Number, size and channels of the images."""
        images, channels, height, width = self.arrays.shape
        return f"<Generation: {images} x {width}x{height} pixels, {channels} channels>"

    @cached_property
    def images(self) -> list[Image.Image]:
        """PIL images of mode L, RGB or RGBA.

        Raises:
            SpecError: The decoder gives another number of channels, NaN or infinite values.
        """
        return to_pil(self.arrays)
