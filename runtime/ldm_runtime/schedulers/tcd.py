"""Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159) with the options of TCDScheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers.consistency import ConsistencySchedule
from ldm_runtime.schedulers.options import eta_value
from ldm_runtime.schedulers.predictions import noise_weights, x0_weights
from ldm_runtime.schedulers.trajectory import Trajectory, finite_trajectory

__all__ = ["TCD"]


@dataclass(frozen=True)
class TCD(ConsistencySchedule):
    """Configuration of a TCDScheduler; names, meanings and defaults are those of diffusers 0.42.

    diffusers' class has the options clip_sample, thresholding and timestep_scaling but never uses them.

    Raises:
        SpecError: Names the option, the value and the expected values.
    """

    CLASS: ClassVar[str] = "TCDScheduler"

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory: denoise below the next timestep, then add noise up to it, except at the last.

        Args:
            num_inference_steps: 1..original_inference_steps.
            eta: Gamma of the paper: 0 is deterministic, 1 fully stochastic.

        Raises:
            SpecError: An argument is out of range; the prediction type divides by the signal or the noise of a timestep
                that has none (ᾱ = 0: zero terminal SNR; ᾱ = 1).
        """
        timesteps, eta = self.timesteps(num_inference_steps), eta_value(eta)
        if eta > 1:
            raise SpecError(f"eta: got {eta:g}, expected a number in [0, 1] for {self.CLASS}")
        alphas, following = self.alphas_cumprod, np.append(timesteps[1:], 0)
        below = np.floor(np.float32(1 - eta) * following.astype(np.float32)).astype(np.int64)
        alpha, alpha_next, alpha_below = alphas[timesteps], alphas[following], alphas[below]
        with np.errstate(all="ignore"):  # non-finite values are refused below
            sqrt_alpha, sqrt_beta = np.sqrt(alpha).astype(np.float64), np.sqrt(1 - alpha).astype(np.float64)
            weights = x0_weights(self.prediction_type, sqrt_alpha, sqrt_beta)
            of_noise = noise_weights(self.prediction_type, sqrt_alpha, sqrt_beta)
            denoised = np.sqrt(alpha_below)[:, None] * weights + np.sqrt(1 - alpha_below)[:, None] * of_noise
            ratio = alpha_next / alpha_below if eta > 0 else np.ones_like(alpha)
            ratio[-1] = 1
        rows = np.zeros((len(timesteps), 1, 4))
        rows[:, 0, :2] = np.sqrt(ratio)[:, None] * denoised
        rows[:, 0, 3] = np.sqrt(1 - ratio)
        return finite_trajectory(timesteps, rows, weights, alpha, draws=eta > 0 and len(timesteps) > 1)
