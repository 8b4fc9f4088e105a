"""What a pipeline gives while it denoises, and at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Step:
    """One finished denoising step: its index from 0, how many there are, its timestep, and what reads the latents."""

    index: int
    total: int
    timestep: int
    read: Callable[[], F32]

    @cached_property
    def latents(self) -> F32:
        """The latents after it, float32 [B, C, h, w]: to be asked for before the next step, where a device has them."""
        return self.read()


@dataclass(frozen=True, eq=False)
class Generation:
    """What a call gives: PIL images in the order of the prompts, those of one prompt side by side, and the latents."""

    images: list[Image.Image]
    latents: F32
