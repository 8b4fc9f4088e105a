"""DDIM (Song et al. 2020, arXiv:2010.02502) with the options and arithmetic of diffusers' DDIMScheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers.noise_schedule import (
    COMPVIS_SPACING,
    EARLY_KEYS,
    PREDICTION_TYPES,
    SIGMA_KEYS,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
    spaced_timesteps,
)
from ldm_runtime.schedulers.options import choice, eta_value, integer, positive, real, step_count, switch
from ldm_runtime.schedulers.predictions import x0_weights
from ldm_runtime.schedulers.trajectory import Clip, Threshold, Trajectory, noisy_weights

__all__ = ["DDIM", "FOREIGN"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

FOREIGN: Mapping[str, tuple[Any, ...] | None] = {
    "skip_prk_steps": None,  # PNDM's warm-up
    **EARLY_KEYS,
    **SIGMA_KEYS,
}


@dataclass(frozen=True)
class DDIM(NoiseSchedule):
    """Configuration of a DDIMScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values. Narrower than diffusers, besides the limits of
            ``NoiseSchedule``: steps_offset is not negative, clip_sample_range and sample_max_value are positive.
    """

    CLASS: ClassVar[str] = "DDIMScheduler"
    FOREIGN: ClassVar[Mapping[str, tuple[Any, ...] | None]] = FOREIGN

    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("steps_offset", integer, 0, self.num_train_timesteps - 1)
        for name in ("clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr"):
            self._set(name, switch)
        self._set("prediction_type", choice, PREDICTION_TYPES)
        self._set("timestep_spacing", choice, (*TIMESTEP_SPACINGS, COMPVIS_SPACING))
        self._set("clip_sample_range", positive)
        self._set("sample_max_value", positive)
        self._set("dynamic_thresholding_ratio", real, 0, 1)
        if not np.isfinite(self.alphas_cumprod).all():
            raise SpecError(
                "scheduler: rescale_betas_zero_snr: got true, but these betas rescale to NaN; expected false"
            )

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps], with the same rounding as in torch."""
        return self._cumulative(self.rescale_betas_zero_snr)

    def timesteps(self, num_inference_steps: int) -> NDArray[np.int64]:
        """Return the timesteps of a trajectory, int64, descending.

        There are ``num_inference_steps`` of them. With timestep_spacing "trailing", some numbers give one more, -1, as
        in diffusers; with "compvis", numbers that do not divide num_train_timesteps give more (``spaced_timesteps``).

        Raises:
            SpecError: The number of steps is not in 1..num_train_timesteps, or steps_offset leads beyond these.
        """
        steps = step_count(num_inference_steps, self.num_train_timesteps)
        return spaced_timesteps(self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset)

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory by formulas (12) and (16) of the paper. Its state is x alone.

        Args:
            num_inference_steps: 1..num_train_timesteps.
            eta: 0 is deterministic DDIM, 1 is as noisy as DDPM.

        Raises:
            SpecError: An argument is out of range; eta is so large that the noise outweighs a step; the prediction type
                divides by the signal or the noise of a timestep that has none (ᾱ = 0: zero terminal SNR; ᾱ = 1).
        """
        timesteps = self.timesteps(num_inference_steps)
        steps, eta = int(num_inference_steps), eta_value(eta)
        alphas = self.alphas_cumprod
        previous = timesteps - self.num_train_timesteps // steps
        final = np.float32(1) if self.set_alpha_to_one else alphas[0]
        alpha, alpha_prev = alphas[timesteps], np.where(previous >= 0, alphas[previous], final)
        beta, beta_prev = 1 - alpha, 1 - alpha_prev
        with np.errstate(all="ignore"):  # non-finite values are refused below
            variance = beta_prev / beta * (1 - alpha / alpha_prev)
            sigma = np.float32(eta) * np.sqrt(variance)
            direction = beta_prev - np.float32(eta) * (np.float32(eta) * variance)  # σ² could round it to below 0
            weights = (np.sqrt(alpha), np.sqrt(beta), np.sqrt(alpha_prev), np.sqrt(np.maximum(direction, 0)))
            sqrt_alpha, sqrt_beta, sqrt_alpha_prev, eps_weight = (values.astype(np.float64) for values in weights)
            rows = _rows(self.prediction_type, sqrt_alpha, sqrt_beta, sqrt_alpha_prev, eps_weight)
            of_x0 = x0_weights(self.prediction_type, sqrt_alpha, sqrt_beta)
            finite = np.isfinite(variance) & np.isfinite(rows).all(axis=1)
            limit = np.sqrt(beta_prev / variance)
        if not finite.all():
            i = int(np.argmin(finite))
            raise SpecError(
                f"scheduler: timestep {timesteps[i]}: got alpha_cumprod {alpha[i]:g}, then {alpha_prev[i]:g}, where "
                f"prediction_type {self.prediction_type!r} divides by zero; expected other betas or timestep_spacing, "
                "and with rescale_betas_zero_snr a model of prediction_type 'v_prediction'"
            )
        wild = ~(direction >= -1e-6)  # values between that and 0 are rounding errors, for which diffusers gives NaN
        if wild.any():
            i = int(np.nanargmin(limit))
            most = math.floor(float(limit[i]) * 1e4) / 1e4
            where = f"at timestep {timesteps[i]} the noise outweighs the step"
            raise SpecError(f"eta: got {eta:g} with {steps} steps, expected at most {most:g}: {where}")
        limit_x0: Clip | Threshold | None = None
        if self.thresholding:
            limit_x0 = Threshold(self.dynamic_thresholding_ratio, self.sample_max_value)
        elif self.clip_sample:
            limit_x0 = Clip(self.clip_sample_range)
        if limit_x0 is not None:
            rows = _rows_with_x0(self.prediction_type, sqrt_alpha, sqrt_beta, sqrt_alpha_prev, eps_weight)
        return Trajectory(
            timesteps=timesteps,
            init_noise_sigma=1.0,
            input_scale=np.ones(len(timesteps), np.float32),
            needs_noise=eta > 0,
            rows=np.concatenate([rows, sigma[:, None]], axis=1)[:, None, :].astype(np.float32),
            x0_weights=of_x0.astype(np.float32),
            noisy_weights=noisy_weights(np.sqrt(alpha), np.sqrt(beta)),
            limit_x0=limit_x0,
        )


def _rows(prediction: str, sqrt_alpha: F64, sqrt_beta: F64, sqrt_alpha_prev: F64, eps_weight: F64) -> F64:
    """Weights of x, prediction and x0 (zero) in the next x; float64 [calls, 3]."""
    if prediction == "epsilon":
        a, b = sqrt_alpha_prev / sqrt_alpha, eps_weight - sqrt_alpha_prev * sqrt_beta / sqrt_alpha
    elif prediction == "sample":
        a, b = eps_weight / sqrt_beta, sqrt_alpha_prev - eps_weight * sqrt_alpha / sqrt_beta
    else:
        a, b = (
            sqrt_alpha_prev * sqrt_alpha + eps_weight * sqrt_beta,
            eps_weight * sqrt_alpha - sqrt_alpha_prev * sqrt_beta,
        )
    return np.stack([a, b, np.zeros_like(a)], axis=1)


def _rows_with_x0(prediction: str, sqrt_alpha: F64, sqrt_beta: F64, sqrt_alpha_prev: F64, eps_weight: F64) -> F64:
    """The same if x0 is clipped or thresholded. As in diffusers, eps is computed from the prediction before that."""
    zeros = np.zeros_like(sqrt_alpha)
    if prediction == "epsilon":
        a, b = zeros, eps_weight
    elif prediction == "sample":
        a, b = eps_weight / sqrt_beta, -eps_weight * sqrt_alpha / sqrt_beta
    else:
        a, b = eps_weight * sqrt_beta, eps_weight * sqrt_alpha
    return np.stack([a, b, sqrt_alpha_prev], axis=1)
