"""The plan of a request: everything that the denoising loop of a model needs for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.guidance import StepBranches
from ldm_runtime.loras.selection import Selection
from ldm_runtime.noise_stream import NoiseStream
from ldm_runtime.quality import QualityResult
from ldm_runtime.request import Request
from ldm_runtime.schedulers.trajectory import Trajectory
from ldm_runtime.start import StartImage

__all__ = ["Plan"]

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked request with everything that the denoising loop needs. ``LatentDiffusionPipeline.plan`` creates it.

    Attributes:
        request: The request, with height and width in pixels, guidance scale, number of chunks and the values of a
            measured setting filled in, and the images that denoising starts from as PIL images.
        seeds: One seed for the batch, or one per image.
        shape: Shape of the latents: (images, channels, height, width).
        latents: Initial noise float32 ``shape`` if the caller gave it.
        guidance_scale: Guidance scale of the request, or the model's default.
        branches: Guidance branches that are evaluated, in the order of their rows; the conditional branch is the last.
        steps: The branches that each UNet call evaluates.
        trajectory: Timesteps and coefficients.
        guidance_rescale: As in the request; 0 without guidance.
        start_image: Images that denoising starts from; None starts from noise.
        shallow: For each UNet call, True if it reuses deep features of an earlier one.
        setting: The measured setting that ``budget`` or "auto" has taken.
        loras: Adapters that change the weights, and their weights.
    """

    request: Request
    seeds: tuple[int, ...]
    shape: tuple[int, int, int, int]
    latents: F32 | None
    guidance_scale: float
    branches: tuple[str, ...]
    steps: tuple[StepBranches, ...]
    trajectory: Trajectory
    guidance_rescale: float = 0.0
    start_image: StartImage | None = None
    shallow: tuple[bool, ...] = ()
    setting: QualityResult | None = None
    loras: Selection = ()

    @property
    def caches(self) -> bool:
        """True if some UNet call reuses deep features."""
        return any(self.shallow)

    @property
    def images(self) -> int:
        """Number of images."""
        return self.shape[0]

    @property
    def guided(self) -> bool:
        """True if some step evaluates the unconditional branch too."""
        return len(self.branches) > 1

    @property
    def puts_back(self) -> bool:
        """True if the unmasked part of an image is restored after each step."""
        return self.start_image is not None and self.start_image.puts_back

    @property
    def rows(self) -> int:
        """Rows of a UNet call that evaluates all branches."""
        return self.images * len(self.branches)

    def noise(self) -> NoiseStream:
        """Endless standard normal noise, float32 of ``shape``: for initial latents unless given, then for each step."""
        return NoiseStream(self.seeds, self.shape)

    def scaled(self, noise: F32) -> F32:
        """Multiply noise by the scale of initial latents."""
        sigma = self.trajectory.init_noise_sigma
        return noise if sigma == 1 else noise * np.float32(sigma)

    def start(self, noise: Iterator[F32]) -> list[F32]:
        """Initial state of the trajectory, from the caller's latents or drawn from ``noise``."""
        return self.trajectory.start(self.scaled(next(noise) if self.latents is None else self.latents))
