"""Base of the schedulers in sigmas: x = x0 + sigma · noise, and the model takes x / sqrt(sigma² + 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers.foreign_options import OTHERS
from ldm_runtime.schedulers.noise_schedule import (
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
    spaced_timesteps,
)
from ldm_runtime.schedulers.options import choice, fail, integer, positive, step_count, switch
from ldm_runtime.schedulers.sigmas import beta_sigmas, exponential_sigmas, karras_sigmas, sigma_timesteps
from ldm_runtime.schedulers.trajectory import Clip, Trajectory, noisy_weights

__all__ = ["ResampledSigmas", "SigmaSchedule", "SigmaSteps"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SigmaSteps:
    """Timesteps and noise levels of a sampling run.

    Args:
        timesteps: float32 [steps], not rounded.
        sigmas: float32 [steps + 1]; the last is the level after the last step.
        init_noise_sigma: The initial latents are standard normal noise times this.
    """

    timesteps: F32
    sigmas: F32
    init_noise_sigma: float


@dataclass(frozen=True)
class SigmaSchedule(NoiseSchedule):
    """Base of the schedulers in sigmas (Karras et al. 2022, arXiv:2206.00364), with the options they share.

    Raises:
        SpecError: Names the option, the value and the expected values. Narrower than diffusers, besides the limits of
            ``NoiseSchedule``: steps_offset is not negative.
    """

    FOREIGN: ClassVar[Mapping[str, tuple[Any, ...] | None]] = OTHERS
    PREDICTION_TYPES: ClassVar[tuple[str, ...]] = PREDICTION_TYPES

    prediction_type: str = "epsilon"
    timestep_spacing: str = "linspace"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("prediction_type", choice, self.PREDICTION_TYPES)
        self._set("timestep_spacing", choice, TIMESTEP_SPACINGS)
        self._set("steps_offset", integer, 0, self.num_train_timesteps - 1)

    def timesteps(self, num_inference_steps: int) -> F32:
        """Return the timestep of every step, float32; "linspace" and resampled sigmas give fractional ones.

        Raises:
            SpecError: The number of steps is not in 1..num_train_timesteps, or so large that the first timestep occurs
                twice; steps_offset leads beyond the training timesteps; the sigmas of training are not distinct.
        """
        return self.steps(num_inference_steps).timesteps

    def steps(self, num_inference_steps: int) -> SigmaSteps:
        """Compute timesteps and sigmas; errors as ``timesteps``."""
        count = step_count(num_inference_steps, self.num_train_timesteps)
        with np.errstate(all="ignore"):  # non-finite values are refused in the end
            alphas = self.alphas_cumprod
            trained = np.sqrt((1 - alphas) / alphas)
            timesteps, sigmas = self._resampled(self._spaced(count), trained, count)
            timesteps = self._for_model(timesteps.astype(np.float32), sigmas)
        if not np.isfinite(timesteps).all():
            where = "scheduler: the sigmas of training are not distinct and finite"
            raise SpecError(f"{where}, which interpolation needs; expected other betas or more training timesteps")
        if np.count_nonzero(timesteps == timesteps[0]) > 1:
            where = f"steps: got {count}: the first two have the same timestep {timesteps[0]:g}, with which"
            raise SpecError(f"{where} pipelines of diffusers fail; expected fewer steps or other sigmas")
        return SigmaSteps(timesteps, sigmas, self._noise_sigma(sigmas))

    @property
    def trained_noise_sigma(self) -> float:
        """Scale of the initial noise before the number of steps is known, as in diffusers before ``set_timesteps``."""
        alphas = self.alphas_cumprod
        return self._noise_sigma(np.sqrt((1 - alphas) / alphas))

    def _noise_sigma(self, sigmas: F32) -> float:
        highest = sigmas.max()
        return float(np.sqrt(highest**2 + np.float32(1)) if self.timestep_spacing == "leading" else highest)

    def _spaced(self, count: int) -> F32:
        if self.timestep_spacing == "linspace":
            return np.linspace(0, self.num_train_timesteps - 1, count, dtype=np.float32)[::-1]
        timesteps = spaced_timesteps(self.timestep_spacing, self.num_train_timesteps, count, self.steps_offset)
        return timesteps.astype(np.float32)

    def _resampled(self, timesteps: F32, trained: F32, count: int) -> tuple[NDArray[Any], F32]:
        """Return timesteps, and sigmas float32 including the final one; here, the sigmas of the timesteps."""
        return timesteps, _with_final(np.interp(timesteps, np.arange(len(trained)), trained), 0.0)

    def _for_model(self, timesteps: F32, sigmas: F32) -> F32:
        """The timesteps that the model takes."""
        return timesteps

    def x0_weights(self, sigmas: F64) -> F64:
        """Weights of x and prediction in x0 at each sigma, float64 [n, 2]."""
        ones, scale = np.ones_like(sigmas), np.sqrt(sigmas**2 + 1)
        if self.prediction_type == "epsilon":
            return np.stack([ones, -sigmas], axis=1)
        if self.prediction_type == "sample":
            return np.stack([np.zeros_like(sigmas), ones], axis=1)
        return np.stack([1 / scale**2, -sigmas / scale], axis=1)

    def slope_weights(self, sigmas: F64) -> F64:
        """Weights of x and prediction in the slope (x - x0) / sigma at each sigma, float64 [n, 2]."""
        ones, scale = np.ones_like(sigmas), np.sqrt(sigmas**2 + 1)
        if self.prediction_type == "epsilon":
            return np.stack([np.zeros_like(sigmas), np.where(sigmas > 0, ones, np.nan)], axis=1)
        if self.prediction_type == "sample":
            return np.stack([ones / sigmas, -ones / sigmas], axis=1)
        return np.stack([np.where(sigmas > 0, sigmas / scale**2, np.nan), ones / scale], axis=1)

    def _trajectory(
        self, steps: SigmaSteps, calls: SigmaSteps, rows: F64, noise: bool = False, clip: Clip | None = None
    ) -> Trajectory:
        """Build the trajectory of ``calls``, one sigma for each UNet call, from rows [calls, slots, slots + 3].

        Raises:
            SpecError: A coefficient is not finite.
        """
        sigmas = calls.sigmas[: len(calls.timesteps)].astype(np.float64)
        with np.errstate(all="ignore"):
            weights, float_rows = self.x0_weights(sigmas).astype(np.float32), rows.astype(np.float32)
        finite = np.isfinite(float_rows).all(axis=(1, 2)) & np.isfinite(weights).all(axis=1)
        if not finite.all():
            i = int(np.argmin(finite))
            where = f"steps: got {len(steps.timesteps)}: call {i} at timestep {calls.timesteps[i]:g}"
            where = f"{where}, sigma {sigmas[i]:g}, has no finite coefficients"
            raise SpecError(f"{where}; expected fewer steps, other betas or other sigmas")
        return Trajectory(
            timesteps=calls.timesteps,
            init_noise_sigma=steps.init_noise_sigma,
            input_scale=(1 / np.sqrt(sigmas**2 + 1)).astype(np.float32),
            needs_noise=noise,
            rows=float_rows,
            x0_weights=weights,
            noisy_weights=noisy_weights(np.ones_like(sigmas), sigmas),
            limit_x0=clip,
        )


@dataclass(frozen=True)
class ResampledSigmas(SigmaSchedule):
    """Base of the schedulers in sigmas that can space sigmas instead of timesteps.

    ``sigma_min`` and ``sigma_max`` are the ends of Karras, exponential and beta sigmas. diffusers reads them from a
    config even if its class does not have these arguments.
    """

    KARRAS_LIMITS: ClassVar[bool] = True
    """True if Karras sigmas use sigma_min and sigma_max."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            self._set(name, switch)
        for name in ("sigma_min", "sigma_max"):
            if getattr(self, name) is not None:
                self._set(name, positive)
        used = [name for name in ("karras", "exponential", "beta") if getattr(self, f"use_{name}_sigmas")]
        if len(used) > 1:
            raise fail(f"use_{used[1]}_sigmas", True, f"false with use_{used[0]}_sigmas")

    def to_config(self) -> dict[str, Any]:
        """Return the options, ready for JSON, and the class name of diffusers as "class"; without an unset limit."""
        limits = ("sigma_min", "sigma_max")
        return {name: value for name, value in super().to_config().items() if name not in limits or value is not None}

    def _resampled(self, timesteps: F32, trained: F32, count: int) -> tuple[NDArray[Any], F32]:
        sigmas, final = self._unsampled(timesteps, trained, count), self._final(trained)
        if not (self.use_karras_sigmas or self.use_exponential_sigmas or self.use_beta_sigmas):
            return timesteps, _with_final(sigmas, final)
        limits = self.KARRAS_LIMITS or not self.use_karras_sigmas
        low = self.sigma_min if limits and self.sigma_min is not None else float(sigmas[-1])
        high = self.sigma_max if limits and self.sigma_max is not None else float(sigmas[0])
        if not 0 < low < np.inf or not 0 < high < np.inf:
            raise SpecError(f"scheduler: sigmas from {low:g} to {high:g}, expected positive ones; change the betas")
        spaced = karras_sigmas if self.use_karras_sigmas else beta_sigmas
        sigmas = (exponential_sigmas if self.use_exponential_sigmas else spaced)(low, high, count)
        return sigma_timesteps(sigmas, np.log(trained)), _with_final(sigmas, final)

    def _unsampled(self, timesteps: F32, trained: F32, count: int) -> NDArray[Any]:
        """Sigmas of the timesteps. Their ends are also the ends of resampled sigmas."""
        return np.interp(timesteps, np.arange(len(trained)), trained)

    def _final(self, trained: F32) -> float:
        return 0.0


def _with_final(sigmas: NDArray[Any], final: float) -> F32:
    return np.concatenate([sigmas, [final]]).astype(np.float32)
