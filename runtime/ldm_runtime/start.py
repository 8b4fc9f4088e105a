"""What denoising starts from: noise, or an image with noise, of which a part may be kept."""

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
        puts_back: The part that the mask keeps is put back after each step, because the UNet does not take the mask.
    """

    image: F32
    mask: F32 | None
    strength: float
    puts_back: bool


@dataclass(frozen=True, eq=False)
class Kept:
    """The part of an image that a mask keeps: after each step the latents there are the image's again, with noise.

    Attributes:
        mask: float32 [images, 1, h, w], 1 where the latents are the sampler's.
        image: Latents of the image, float32 [images, C, h, w].
        noise: The noise that is added to them, of the same shape.
    """

    mask: F32
    image: F32
    noise: F32

    def blend(self, latents: F32, trajectory: Trajectory, calls: int) -> F32:
        """Latents after so many calls of a trajectory, float32 [images, C, h, w], with the kept part of the image."""
        of_image, of_noise = trajectory.noisy_weights[calls]
        kept = of_image * self.image + of_noise * self.noise if of_noise else self.image
        blended: F32 = (1 - self.mask) * kept + self.mask * latents
        return blended


@dataclass(frozen=True, eq=False)
class Start:
    """The start of a plan's denoising loop.

    Attributes:
        latents: Initial latents, float32 [images, C, h, w].
        noise: The noise of the steps, which follows on that of the start.
        kept: The part of an image that is put back after each step.
        conditioning: Inputs of the UNet that depend on the noise of the start, [images, …], the same for every branch.
    """

    latents: F32
    noise: NoiseStream
    kept: Kept | None = None
    conditioning: Mapping[str, NDArray[Any]] = field(default_factory=dict)
