"""UniPC (Zhao et al. 2023, arXiv:2302.04867) with the options of diffusers' UniPCMultistepScheduler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import as_integer
from ldm_runtime.schedulers.dpm_solver_rows import noise_levels
from ldm_runtime.schedulers.foreign_options import OTHERS
from ldm_runtime.schedulers.noise_schedule import PREDICTION_TYPES, TIMESTEP_SPACINGS, NoiseSchedule
from ldm_runtime.schedulers.options import among, choice, fail, integer, positive, real, step_count, switch
from ldm_runtime.schedulers.predictions import noise_weights, x0_weights
from ldm_runtime.schedulers.sigmas import (
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    sigma_timesteps,
    solver_timesteps,
)
from ldm_runtime.schedulers.trajectory import Threshold, Trajectory, noisy_weights
from ldm_runtime.schedulers.unipc_rows import UniPCStep, corrector, predictor

__all__ = ["UniPC"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

SWITCHES = (
    "thresholding",
    "predict_x0",
    "lower_order_final",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "rescale_betas_zero_snr",
)
HIGHEST_ORDER = 4


@dataclass(frozen=True)
class UniPC(NoiseSchedule):
    """Configuration of a UniPCMultistepScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values. Narrower than diffusers, besides the limits of
            ``NoiseSchedule``: solver_order is at most 4, steps_offset is not negative; models that predict a flow and
            another solver as predictor (solver_p) are not supported.
    """

    CLASS: ClassVar[str] = "UniPCMultistepScheduler"
    FOREIGN: ClassVar[Mapping[str, tuple[Any, ...] | None]] = OTHERS

    solver_order: int = 2
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    predict_x0: bool = True
    solver_type: str = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in SWITCHES:
            self._set(name, switch)
        if among(self.solver_type, ("midpoint", "heun", "logrho")):  # of DPM-Solver, which diffusers takes for bh2
            object.__setattr__(self, "solver_type", "bh2")
        self._set("solver_type", choice, ("bh1", "bh2"))
        self._set("prediction_type", choice, PREDICTION_TYPES)
        self._set("timestep_spacing", choice, TIMESTEP_SPACINGS)
        self._set("final_sigmas_type", choice, ("zero", "sigma_min"))
        self._set("solver_order", integer, 1, HIGHEST_ORDER)
        self._set("steps_offset", integer, 0, self.num_train_timesteps - 1)
        self._set("dynamic_thresholding_ratio", real, 0, 1)
        self._set("sample_max_value", positive)
        self._set("disable_corrector", _step_indices)
        for name in ("sigma_min", "sigma_max"):
            if getattr(self, name) is not None:
                self._set(name, positive)
        used = [name for name in ("karras", "exponential", "beta") if getattr(self, f"use_{name}_sigmas")]
        if len(used) > 1:
            raise fail(f"use_{used[1]}_sigmas", True, f"false with use_{used[0]}_sigmas")
        if not np.isfinite(self.alphas_cumprod).all():
            raise fail("rescale_betas_zero_snr", True, "false, because these betas rescale to NaN")

    def to_config(self) -> dict[str, Any]:
        """Return the options, ready for JSON, and the class name of diffusers as "class"; without an unset limit."""
        config = super().to_config() | {"disable_corrector": list(self.disable_corrector)}
        limits = ("sigma_min", "sigma_max")
        return {name: value for name, value in config.items() if name not in limits or value is not None}

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps]; the last is 2**-24 if rescaled to zero SNR."""
        return self._cumulative_above_zero(self.rescale_betas_zero_snr)

    def timesteps(self, num_inference_steps: int) -> I64:
        """Return the timestep of every UNet call, int64; with "trailing", some numbers of steps give one more, -1.

        A timestep that is interpolated from a sigma can differ from diffusers' by 1 where the last bit of the sigma
        decides.

        Raises:
            SpecError: The number of steps is not in 1..num_train_timesteps, or so large that the first timestep occurs
                twice; the sigmas of training are not distinct.
        """
        return self._timesteps_and_sigmas(num_inference_steps)[0]

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory: each call first corrects the x that it starts from, then predicts the next.

        Its state is x, the x that the last step started from, and the last ``solver_order`` predictions of x0 or noise.

        Args:
            num_inference_steps: 1..num_train_timesteps.
            eta: Ignored; the method is deterministic.

        Raises:
            SpecError: The number of steps is out of range, or so large that two calls have the same sigma; the options
                divide by a sigma that is zero.
        """
        return self.trajectory_after(0, num_inference_steps, eta)

    def trajectory_after(self, steps: int, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory without its first ``steps`` steps; arguments and errors as in ``NoiseSchedule``."""
        timesteps, sigmas = self._timesteps_and_sigmas(num_inference_steps)
        levels, calls, slots = noise_levels(sigmas), len(timesteps), self.solver_order + 2
        rows, order = np.zeros((calls, slots, slots + 3)), 0
        with np.errstate(all="ignore"):  # non-finite values are refused below
            alpha, sigma, _ = levels[:, :calls]
            weights = x0_weights(self.prediction_type, alpha, sigma)
            values = weights if self.predict_x0 else noise_weights(self.prediction_type, alpha, sigma)
            for i in range(calls):
                rows[i], order = self._rows(levels, i, calls, values[i], (order, max(0, i - steps)))
            float_rows, of_x0 = rows.astype(np.float32), weights.astype(np.float32)
        finite = np.isfinite(float_rows).all(axis=(1, 2)) & np.isfinite(of_x0).all(axis=1)
        if not finite.all():
            i = int(np.argmin(finite))
            where = f"steps: got {int(num_inference_steps)}: call {i} at timestep {timesteps[i]}, sigma {sigmas[i]:g}"
            raise SpecError(f"{where}, has no finite coefficients; expected fewer steps or another final_sigmas_type")
        limit = Threshold(self.dynamic_thresholding_ratio, self.sample_max_value)
        return Trajectory(
            timesteps=timesteps,
            init_noise_sigma=1.0,
            input_scale=np.ones(calls, np.float32),
            needs_noise=False,
            rows=float_rows,
            x0_weights=of_x0,
            noisy_weights=noisy_weights(alpha, sigma),
            limit_x0=limit if self.thresholding and self.predict_x0 else None,
        ).after(steps)

    def _rows(self, levels: F64, i: int, calls: int, value: F64, history: tuple[int, int]) -> tuple[F64, int]:
        """Return the rows of call ``i``, float64 [slots, slots + 3], and the order of its step.

        ``history`` is the order of the last step and the number of calls before this one.
        """
        before, done = history
        slots = self.solver_order + 2
        unit = np.eye(slots + 3)
        current = value[0] * unit[0] + value[1] * unit[slots]
        if self.thresholding and self.predict_x0:
            current = unit[slots + 1]
        x = unit[0]
        if done and i - 1 not in self.disable_corrector:
            of_x, of_values, of_current = corrector(self._step(levels, i, before))
            x = of_x * unit[1] + of_values @ unit[2 : 2 + before] + of_current * current
        order = min(self.solver_order, calls - i if self.lower_order_final else self.solver_order, done + 1)
        of_x, of_values = predictor(self._step(levels, i + 1, order))
        earlier = np.vstack([current, unit[2 : 1 + self.solver_order]])
        return np.vstack([of_x * x + of_values @ earlier[:order], x, earlier]), order

    def _step(self, levels: F64, target: int, order: int) -> UniPCStep:
        """The step to the noise level ``target`` from the ``order`` levels before it."""
        return UniPCStep(levels[:, [target - k for k in range(order + 1)]], self.predict_x0, self.solver_type)

    def _timesteps_and_sigmas(self, num_inference_steps: int) -> tuple[I64, F32]:
        """Timesteps, int64 [calls], and sigmas, float32 [calls + 1]."""
        steps, count = step_count(num_inference_steps, self.num_train_timesteps), self.num_train_timesteps
        with np.errstate(all="ignore"):  # trajectory() refuses non-finite values
            alphas = self.alphas_cumprod
            trained: F64 = np.sqrt((1 - alphas) / alphas).astype(np.float64)
            low = self.sigma_min if self.sigma_min is not None else float(trained[0])
            high = self.sigma_max if self.sigma_max is not None else float(trained[-1])
            times: NDArray[Any]
            if self.use_karras_sigmas or self.use_exponential_sigmas or self.use_beta_sigmas:
                if not 0 < low < np.inf or not 0 < high < np.inf:
                    raise SpecError(f"scheduler: sigmas from {low:g} to {high:g}, expected positive; change the betas")
                spaced = karras_sigmas if self.use_karras_sigmas else beta_sigmas
                sigmas = (exponential_sigmas if self.use_exponential_sigmas else spaced)(low, high, steps)
                times, final = sigma_timesteps(sigmas, np.log(trained.astype(np.float32))), sigmas[-1]
                times = times.round() if self.use_karras_sigmas else times
            else:
                times = solver_timesteps(self.timestep_spacing, count, count, steps, self.steps_offset)
                sigmas, final = np.interp(times, np.arange(count), trained), trained[0]
        if not np.isfinite(times).all():
            where = "scheduler: the sigmas of training are not distinct and finite"
            raise SpecError(f"{where}, which interpolation needs; expected other betas or more training timesteps")
        timesteps = times.astype(np.int64)
        if np.count_nonzero(timesteps == timesteps[0]) > 1:
            where = f"steps: got {steps}: the first two have the same timestep {timesteps[0]}, with which"
            raise SpecError(f"{where} pipelines of diffusers fail; expected fewer steps or other sigmas")
        last = final if self.final_sigmas_type == "sigma_min" else 0.0
        return timesteps, np.append(sigmas, last).astype(np.float32)


def _step_indices(name: str, value: Any) -> tuple[int, ...]:
    indices = [as_integer(index) for index in value] if isinstance(value, (list, tuple)) else [None]
    if any(index is None or index < 0 for index in indices):
        raise fail(name, value, "a list of step indices >= 0")
    return tuple(index for index in indices if index is not None)
