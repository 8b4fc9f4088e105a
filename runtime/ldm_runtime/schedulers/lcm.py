"""Latent consistency models (Luo et al. 2023, arXiv:2310.04378) with the options of diffusers' LCMScheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ldm_runtime.schedulers.consistency import ConsistencySchedule
from ldm_runtime.schedulers.predictions import x0_weights
from ldm_runtime.schedulers.trajectory import Clip, Threshold, Trajectory, finite_trajectory

__all__ = ["LCM"]

SIGMA_DATA = 0.5
"""Standard deviation of the data that the boundary condition assumes."""


@dataclass(frozen=True)
class LCM(ConsistencySchedule):
    """Configuration of an LCMScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values.
    """

    CLASS: ClassVar[str] = "LCMScheduler"

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory: x0 by the boundary condition, then noise for the next timestep except at the last.

        Args:
            num_inference_steps: 1..original_inference_steps.
            eta: Ignored; the noise does not depend on it.

        Raises:
            SpecError: The number of steps is out of range; the prediction type divides by the signal of a timestep that
                has none (zero terminal SNR).
        """
        timesteps = self.timesteps(num_inference_steps)
        alpha = self.alphas_cumprod[timesteps]
        alpha_next, scaled = np.append(alpha[1:], np.float32(1)), timesteps * self.timestep_scaling
        of_x = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        of_x0 = scaled / np.sqrt(scaled**2 + SIGMA_DATA**2)
        signal, noise = np.sqrt(alpha_next).astype(np.float64), np.sqrt(1 - alpha_next)
        with np.errstate(all="ignore"):  # non-finite values are refused below
            sqrt_alpha, sqrt_beta = np.sqrt(alpha).astype(np.float64), np.sqrt(1 - alpha).astype(np.float64)
            weights = x0_weights(self.prediction_type, sqrt_alpha, sqrt_beta)
        limit: Clip | Threshold | None = None
        if self.thresholding:
            limit = Threshold(self.dynamic_thresholding_ratio, self.sample_max_value)
        elif self.clip_sample:
            limit = Clip(self.clip_sample_range)
        rows = np.zeros((len(timesteps), 1, 4))
        if limit is None:
            rows[:, 0, :2] = (signal * of_x0)[:, None] * weights
        else:
            rows[:, 0, 2] = signal * of_x0
        rows[:, 0, 0] += signal * of_x
        rows[:, 0, 3] = noise
        return finite_trajectory(timesteps, rows, weights, alpha, limit)
