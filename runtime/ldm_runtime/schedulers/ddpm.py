"""DDPM (Ho et al. 2020, arXiv:2006.11239) with the options and arithmetic of diffusers' DDPMScheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.schedulers.foreign_options import OTHERS
from ldm_runtime.schedulers.noise_schedule import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
    spaced_timesteps,
)
from ldm_runtime.schedulers.options import choice, fail, integer, positive, real, step_count, switch
from ldm_runtime.schedulers.predictions import x0_weights
from ldm_runtime.schedulers.trajectory import Clip, Threshold, Trajectory, finite_trajectory

__all__ = ["DDPM"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")
SMALLEST_VARIANCE = np.float32(1e-20)


@dataclass(frozen=True)
class DDPM(NoiseSchedule):
    """Configuration of a DDPMScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values. Narrower than diffusers, besides the limits of
            ``NoiseSchedule``: steps_offset is not negative, clip_sample_range and sample_max_value are positive; models
            that predict a variance are not supported, nor is variance_type "fixed_large_log", with which diffusers
            gives NaN.
    """

    CLASS: ClassVar[str] = "DDPMScheduler"
    FOREIGN: ClassVar[Mapping[str, tuple[Any, ...] | None]] = OTHERS
    BETA_SCHEDULES: ClassVar[tuple[str, ...]] = (*BETA_SCHEDULES, "sigmoid", "laplace")

    variance_type: str = "fixed_small"
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("variance_type", choice, VARIANCE_TYPES)
        self._set("prediction_type", choice, PREDICTION_TYPES)
        self._set("timestep_spacing", choice, TIMESTEP_SPACINGS)
        self._set("steps_offset", integer, 0, self.num_train_timesteps - 1)
        for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
            self._set(name, switch)
        self._set("clip_sample_range", positive)
        self._set("sample_max_value", positive)
        self._set("dynamic_thresholding_ratio", real, 0, 1)
        if not np.isfinite(self.alphas_cumprod).all():
            raise fail("rescale_betas_zero_snr", True, "false, because these betas rescale to NaN")

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps], with the same rounding as in torch."""
        return self._cumulative(self.rescale_betas_zero_snr)

    def timesteps(self, num_inference_steps: int) -> I64:
        """Return the timesteps, int64, descending; with "trailing", some numbers of steps give one more, -1.

        Raises:
            SpecError: The number of steps is not in 1..num_train_timesteps, or steps_offset leads beyond these.
        """
        steps = step_count(num_inference_steps, self.num_train_timesteps)
        return spaced_timesteps(self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset)

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory by formula (7) of the paper. Its state is x alone.

        The timesteps 0 and -1 add no noise; they are the last ones, whose noise has weight zero here.

        Args:
            num_inference_steps: 1..num_train_timesteps.
            eta: Ignored; the noise does not depend on it.

        Raises:
            SpecError: The number of steps is out of range; the prediction type divides by the signal or the noise of a
                timestep that has none (ᾱ = 0: zero terminal SNR; ᾱ = 1).
        """
        timesteps = self.timesteps(num_inference_steps)
        alphas, previous = self.alphas_cumprod, np.append(timesteps[1:], -1)
        alpha, alpha_prev = alphas[timesteps], np.where(previous >= 0, alphas[previous], np.float32(1))
        with np.errstate(all="ignore"):  # non-finite values are refused below
            beta, beta_prev, beta_now = 1 - alpha, 1 - alpha_prev, 1 - alpha / alpha_prev
            of_x0 = np.sqrt(alpha_prev) * beta_now / beta
            of_x = np.sqrt(alpha / alpha_prev) * beta_prev / beta
            small = np.maximum(beta_prev / beta * beta_now, SMALLEST_VARIANCE)
            noise = np.sqrt(beta_now if self.variance_type == "fixed_large" else small)
            weights = x0_weights(
                self.prediction_type, np.sqrt(alpha).astype(np.float64), np.sqrt(beta).astype(np.float64)
            )
        rows = np.zeros((len(timesteps), 1, 4))
        limit: Clip | Threshold | None = None
        if self.thresholding:
            limit = Threshold(self.dynamic_thresholding_ratio, self.sample_max_value)
        elif self.clip_sample:
            limit = Clip(self.clip_sample_range)
        if limit is None:
            rows[:, 0, :2] = of_x0[:, None] * weights
        else:
            rows[:, 0, 2] = of_x0
        rows[:, 0, 0] += of_x
        rows[:, 0, 3] = np.where(timesteps > 0, noise, 0)
        return finite_trajectory(timesteps, rows, weights, alpha, limit)
