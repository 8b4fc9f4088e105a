"""Multistep DPM-Solver and DPM-Solver++ with the options and arithmetic of diffusers' DPMSolverMultistepScheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers.dpm_solver_options import CHOICES, FOREIGN, RENAMED, SWITCHES
from ldm_runtime.schedulers.dpm_solver_rows import model_value, noise_levels, update, x0_weights
from ldm_runtime.schedulers.noise_schedule import NoiseSchedule
from ldm_runtime.schedulers.options import among, choice, fail, integer, positive, real, step_count, switch
from ldm_runtime.schedulers.sigmas import (
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    sigma_timesteps,
    solver_timesteps,
)
from ldm_runtime.schedulers.trajectory import Threshold, Trajectory, noisy_weights

__all__ = ["FOREIGN", "MAX_STEPS", "DPMSolverMultistep"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

MAX_STEPS = 10_000


@dataclass(frozen=True)
class DPMSolverMultistep(NoiseSchedule):
    """Configuration of a DPMSolverMultistepScheduler; names, meanings and defaults are those of diffusers 0.42.

    The methods are DPM-Solver (Lu et al. 2022, arXiv:2206.00927), DPM-Solver++ (arXiv:2211.01095) and their stochastic
    variants, which draw noise at every call. diffusers' class has no arguments ``sigma_min`` and ``sigma_max``, but it
    reads them from a config for Karras, exponential and beta sigmas.

    Raises:
        SpecError: Names the option, the value and the expected values. Narrower than diffusers, besides the limits of
            ``NoiseSchedule``: solver_order is 1, 2 or 3, and not 3 with "sde-dpmsolver"; steps_offset is not negative;
            models that predict a flow or a variance are not supported.
    """

    CLASS: ClassVar[str] = "DPMSolverMultistepScheduler"
    FOREIGN: ClassVar[Mapping[str, tuple[Any, ...] | None]] = FOREIGN

    solver_order: int = 2
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_lu_lambdas: bool = False
    final_sigmas_type: str = "zero"
    lambda_min_clipped: float = -math.inf
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in SWITCHES:
            self._set(name, switch)
        for name, renamed in RENAMED.items():
            for old, new in renamed.items():
                if among(getattr(self, name), (old,)):
                    object.__setattr__(self, name, new)
        for name, choices in CHOICES.items():
            self._set(name, choice, choices)
        self._set("solver_order", integer, 1, 2 if self.algorithm_type == "sde-dpmsolver" else 3)
        self._set("steps_offset", integer, 0, self.num_train_timesteps - 1)
        self._set("dynamic_thresholding_ratio", real, 0, 1)
        self._set("sample_max_value", positive)
        self._set("lambda_min_clipped", real, -math.inf, math.inf)
        for name in ("sigma_min", "sigma_max"):
            if getattr(self, name) is not None:
                self._set(name, positive)
        spacings = [name for name in ("karras", "exponential", "beta") if getattr(self, f"use_{name}_sigmas")]
        if len(spacings) > 1:
            raise fail(f"use_{spacings[1]}_sigmas", True, f"false with use_{spacings[0]}_sigmas")
        if self.final_sigmas_type == "zero" and not self.algorithm_type.endswith("++"):
            raise fail("final_sigmas_type", "zero", f"sigma_min with algorithm_type {self.algorithm_type!r}")
        if not np.isfinite(self.alphas_cumprod).all():
            raise fail("rescale_betas_zero_snr", True, "false, because these betas rescale to NaN")

    def to_config(self) -> dict[str, Any]:
        """Return the options, ready for JSON, and the class name of diffusers as "class".

        An unset sigma_min or sigma_max and a lambda_min_clipped of -inf, which JSON cannot express, are left out.
        """
        config = super().to_config()
        omitted = [name for name in ("sigma_min", "sigma_max") if config[name] is None]
        if self.lambda_min_clipped == -math.inf:
            omitted.append("lambda_min_clipped")
        return {name: value for name, value in config.items() if name not in omitted}

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps]; the last is 2**-24 if rescaled to zero SNR."""
        return self._cumulative_above_zero(self.rescale_betas_zero_snr)

    def timesteps(self, num_inference_steps: int) -> I64:
        """Return the timestep of every UNet call, int64 [calls].

        As in diffusers, these are not always ``num_inference_steps`` timesteps within the training timesteps: "leading"
        with steps_offset can exceed them, "trailing" can end with -1 or, with lambda_min_clipped, be shorter. The
        sigma of such a timestep is that of the nearest training timestep. A timestep that is interpolated from a sigma
        can differ from diffusers' by 1 where the last bit of the sigma decides.

        Raises:
            SpecError: The number of steps is not in 1..10 000.
        """
        return self._timesteps_and_sigmas(num_inference_steps)[0]

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory. Its state is x and the ``solver_order - 1`` previous predictions of x0 or noise.

        The coefficients are computed in float64 by diffusers' formulas. A step of length zero leaves x as it is; for
        some of them diffusers gives NaN.

        Args:
            num_inference_steps: 1..10 000.
            eta: Ignored; the noise of the stochastic variants does not depend on it.

        Raises:
            SpecError: The number of steps is out of range, or so large that two calls whose distance the solver divides
                by have the same sigma; or a timestep has no signal.
        """
        return self.trajectory_after(0, num_inference_steps, eta)

    def trajectory_after(self, steps: int, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory without its first ``steps`` steps; arguments and errors as in ``NoiseSchedule``."""
        timesteps, sigmas = self._timesteps_and_sigmas(num_inference_steps)
        calls, order = len(timesteps), self.solver_order
        levels = noise_levels(sigmas)
        rows = np.zeros((calls, order, order + 3))
        with np.errstate(all="ignore"):  # non-finite values are refused below
            weights = x0_weights(self.prediction_type, levels, calls)
            for i in range(calls):
                rows[i] = self._rows(levels, i, calls, weights[i], max(0, i - steps) + 1)
            float_rows, x0 = rows.astype(np.float32), weights.astype(np.float32)
        finite = np.isfinite(float_rows).all(axis=(1, 2)) & np.isfinite(x0).all(axis=1)
        if not finite.all():
            i = int(np.argmin(finite))
            where = f"steps: got {int(num_inference_steps)}: call {i} at timestep {timesteps[i]}, sigma {sigmas[i]:g}"
            raise SpecError(f"{where}, has no finite coefficients; expected fewer steps, other betas or other sigmas")
        limit = Threshold(self.dynamic_thresholding_ratio, self.sample_max_value) if self.thresholding else None
        return Trajectory(
            timesteps=timesteps,
            init_noise_sigma=1.0,
            input_scale=np.ones(calls, np.float32),
            needs_noise=self.algorithm_type.startswith("sde"),
            rows=float_rows,
            x0_weights=x0,
            noisy_weights=noisy_weights(*levels[:2, :calls]),
            limit_x0=limit,
        ).after(steps)

    def _rows(self, levels: F64, i: int, calls: int, x0_weights: F64, known: int) -> F64:
        """Rows of call ``i``, float64 [slots, slots + 3]; ``known`` is the number of available predictions."""
        short, last = self.lower_order_final and calls < 15, i == calls - 1
        order = min(self.solver_order, known)
        if last and (self.euler_at_final or short or self.final_sigmas_type == "zero"):
            order = 1
        elif i == calls - 2 and short:
            order = min(order, 2)
        of_x, of_noise, of_models = update(
            self.algorithm_type, self.solver_type, order, levels[:, max(i - 2, 0) : i + 2]
        )
        slots = self.solver_order
        current = model_value(self.algorithm_type, self.thresholding, slots, levels[:, i], x0_weights)
        rows = np.zeros((slots, slots + 3))
        rows[0] = of_models[0] * current
        rows[0, 0] += of_x
        rows[0, 1:order] = of_models[1:]
        rows[0, slots + 2] = of_noise
        if slots > 1:
            rows[1] = current
        if slots > 2:
            rows[2, 1] = 1
        return rows

    def _timesteps_and_sigmas(self, num_inference_steps: int) -> tuple[I64, F32]:
        """Timesteps, int64 [calls], and sigmas, float32 [calls + 1]."""
        steps = step_count(num_inference_steps, MAX_STEPS)
        with np.errstate(all="ignore"):  # trajectory() refuses non-finite values
            alphas = self.alphas_cumprod
            trained: F64 = np.sqrt((1 - alphas) / alphas).astype(np.float64)
            logs = np.log(trained.astype(np.float32))
            low = self.sigma_min if self.sigma_min is not None else float(trained[0])
            high = self.sigma_max if self.sigma_max is not None else float(trained[-1])
            if self.use_karras_sigmas:
                sigmas = karras_sigmas(low, high, steps)
            elif self.use_lu_lambdas:
                first, last = float(logs[-1]), float(logs[0])
                sigmas = np.exp(first + np.linspace(0, 1, steps) * (last - first))
            elif self.use_exponential_sigmas:
                sigmas = exponential_sigmas(low, high, steps)
            elif self.use_beta_sigmas:
                sigmas = beta_sigmas(low, high, steps)
            else:
                timesteps = self._spaced(steps, alphas)
                sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
                return timesteps.astype(np.int64), self._with_final(sigmas, trained)
            times = sigma_timesteps(sigmas, logs)
        if (self.use_karras_sigmas or self.use_lu_lambdas) and self.beta_schedule != "squaredcos_cap_v2":
            times = times.round()
        if not np.isfinite(times).all():
            where = "scheduler: the sigmas of training are not distinct and finite"
            raise SpecError(f"{where}, which interpolation needs; expected other betas or more training timesteps")
        return times.astype(np.int64), self._with_final(sigmas, trained)

    def _with_final(self, sigmas: F64, trained: F64) -> F32:
        final = trained[0] if self.final_sigmas_type == "sigma_min" else 0.0
        return np.concatenate([sigmas, [final]]).astype(np.float32)

    def _spaced(self, steps: int, alphas: F32) -> I64:
        count = self.num_train_timesteps
        log_snr = np.log(np.sqrt(alphas)) - np.log(np.sqrt(1 - alphas))
        end = count - int(np.searchsorted(log_snr[::-1], np.float32(self.lambda_min_clipped)))
        timesteps = solver_timesteps(self.timestep_spacing, count, end, steps, self.steps_offset)
        if not len(timesteps):
            raise fail("lambda_min_clipped", self.lambda_min_clipped, "a lower value, which leaves some timesteps")
        return timesteps
