"""A request that runs in a batch: its next step, and its place in the arrays of the batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.call_rows import Span
from ldm_runtime.batching.job import Job
from ldm_runtime.denoiser import Tensors
from ldm_runtime.plan import Plan
from ldm_runtime.schedulers.trajectory import Trajectory
from ldm_runtime.start import Start

__all__ = ["Member"]

F32 = NDArray[np.float32]


@dataclass(eq=False)
class Member:
    """A running request.

    Attributes:
        job: The request.
        start: Its initial latents, noise, and the part of the image that its mask keeps.
        schedule: The UNet's schedule inputs at each step, [calls, …].
        rows: Coefficients of its trajectory for the slots of the batch, float32 [calls, slots, slots + 3].
        index: Index of the next step.
        span: Its place in the batch's arrays.
        preview: x0 as predicted at the last step, float32 [images, C, h, w], if a preview is due.
    """

    job: Job
    start: Start
    schedule: Tensors
    rows: F32
    index: int = 0
    span: Span = field(default_factory=lambda: Span(0, 0, 0, 0))
    preview: F32 | None = None

    @property
    def plan(self) -> Plan:
        """The request's plan."""
        return self.job.plan

    @property
    def trajectory(self) -> Trajectory:
        """Timesteps and coefficients."""
        return self.job.plan.trajectory

    @property
    def done(self) -> bool:
        """True after the last step."""
        return self.index == len(self.trajectory)

    @property
    def preview_due(self) -> bool:
        """True if the next step ends with a preview."""
        every = self.job.preview_every
        return bool(every) and (self.index + 1) % every == 0 and self.index + 1 < len(self.trajectory)
