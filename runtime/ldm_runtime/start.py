"""The start of denoising: noise, or a noised image of which a mask may keep a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.noise_stream import NoiseStream
from ldm_runtime.schedulers.trajectory import Trajectory

__all__ = ["Kept", "Start", "StartImage"]

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StartImage:
    """Images that a plan starts from.

    Attributes:
        image: float32 [N, channels, H, W] in [0, 1].
        mask: float32 [M, 1, H, W], 1 where the image is repainted and 0 where it is kept; None repaints all of it.
        strength: Share of the steps that run, above 0 and at most 1.
        puts_back: True if the unmasked part is restored after each step, because the UNet has no input for the mask.
    """

    image: F32
    mask: F32 | None
    strength: float
    puts_back: bool


@dataclass(frozen=True, eq=False)
class Kept:
    """The part of an image that a mask keeps. After each step, the latents there are replaced by noised image latents.

    Attributes:
        mask: float32 [images, 1, h, w], 1 where the image is repainted.
        image: Latents of the image, float32 [images, C, h, w].
        noise: The noise that is added to them, of the same shape.
    """

    mask: F32
    image: F32
    noise: F32

    def blend(self, latents: F32, trajectory: Trajectory, calls: int) -> F32:
        """Restore the kept part in the latents after ``calls`` calls of a trajectory; float32 [images, C, h, w]."""
        of_image, of_noise = trajectory.noisy_weights[calls]
        kept = of_image * self.image + of_noise * self.noise if of_noise else self.image
        blended: F32 = (1 - self.mask) * kept + self.mask * latents
        return blended


@dataclass(frozen=True, eq=False)
class Start:
    """The start of a plan's denoising loop.

    Attributes:
        latents: Initial latents, float32 [images, C, h, w].
        noise: The noise of the steps, which continues the stream of the initial noise.
        kept: The part of an image that is restored after each step.
        conditioning: Inputs of the UNet that depend on the initial noise, [images, …], the same for every branch.
    """

    latents: F32
    noise: NoiseStream
    kept: Kept | None = None
    conditioning: Mapping[str, NDArray[Any]] = field(default_factory=dict)
