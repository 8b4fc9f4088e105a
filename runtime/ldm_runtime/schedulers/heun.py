"""Heun's method (Karras et al. 2022, arXiv:2206.00364, algorithm 1) as diffusers' HeunDiscreteScheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ldm_runtime.schedulers.noise_schedule import BETA_SCHEDULES
from ldm_runtime.schedulers.options import positive, switch
from ldm_runtime.schedulers.sigma_schedule import ResampledSigmas, SigmaSteps
from ldm_runtime.schedulers.trajectory import Clip, Trajectory

__all__ = ["Heun"]


@dataclass(frozen=True)
class Heun(ResampledSigmas):
    """Configuration of a HeunDiscreteScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values. Narrower than diffusers: clip_sample_range is
            positive.
    """

    CLASS: ClassVar[str] = "HeunDiscreteScheduler"
    CALLS_PER_STEP: ClassVar[int] = 2
    BETA_SCHEDULES: ClassVar[tuple[str, ...]] = (*BETA_SCHEDULES, "exp")

    beta_start: float = 0.00085
    beta_end: float = 0.012
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("clip_sample", switch)
        self._set("clip_sample_range", positive)

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory: two calls for each step but the last, which is one of Euler's.

        The state is x and, after the first call of a step, x advanced by half of the step's first slope.

        Args:
            num_inference_steps: 1..num_train_timesteps.
            eta: Ignored; the method is deterministic.

        Raises:
            SpecError: The number of steps is out of range, or a sigma is zero where the method divides by it.
        """
        steps = self.steps(num_inference_steps)
        count = len(steps.timesteps)
        at = np.repeat(np.arange(count), 2)[1:]  # index of the sigma of each call
        second = np.arange(2 * count - 1) % 2 == 1
        calls = SigmaSteps(steps.timesteps[at], steps.sigmas[at], steps.init_noise_sigma)
        sigmas = steps.sigmas.astype(np.float64)
        lengths = np.diff(sigmas)[at - second][:, None]
        with np.errstate(all="ignore"):  # non-finite values are refused below
            if self.clip_sample:  # slopes are (x - x0) / sigma
                slope = np.array([1.0, 0.0, -1.0]) / sigmas[at][:, None]
            else:
                slope = np.pad(self.slope_weights(sigmas[at]), ((0, 0), (0, 1)))
            moves = lengths * slope
        rows = np.zeros((2 * count - 1, 2, 5))
        columns = [0, 2, 3]
        rows[:, 0, columns] = np.where(second[:, None], moves / 2, moves)
        rows[~second, 0, 0] += 1
        rows[second, 0, 1] = 1
        rows[np.ix_(~second, [1], columns)] = (moves / 2)[~second][:, None]
        rows[~second, 1, 0] += 1
        return self._trajectory(steps, calls, rows, clip=Clip(self.clip_sample_range) if self.clip_sample else None)
