"""Euler's method (Karras et al. 2022, arXiv:2206.00364, algorithm 1) as diffusers' EulerDiscreteScheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.schedulers.options import choice, fail, switch
from ldm_runtime.schedulers.sigma_schedule import ResampledSigmas
from ldm_runtime.schedulers.trajectory import Trajectory

__all__ = ["Euler"]

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Euler(ResampledSigmas):
    """Configuration of an EulerDiscreteScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values.
    """

    CLASS: ClassVar[str] = "EulerDiscreteScheduler"

    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("interpolation_type", choice, ("linear", "log_linear"))
        self._set("timestep_type", choice, ("discrete", "continuous"))
        self._set("final_sigmas_type", choice, ("zero", "sigma_min"))
        self._set("rescale_betas_zero_snr", switch)
        if not np.isfinite(self.alphas_cumprod).all():
            raise fail("rescale_betas_zero_snr", True, "false, because these betas rescale to NaN")

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps]; the last is 2**-24 if rescaled to zero SNR."""
        return self._cumulative_above_zero(self.rescale_betas_zero_snr)

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory. Its state is x alone.

        Args:
            num_inference_steps: 1..num_train_timesteps.
            eta: Ignored; the method is deterministic.

        Raises:
            SpecError: The number of steps is out of range, or a sigma is zero where the method divides by it.
        """
        steps = self.steps(num_inference_steps)
        sigmas = steps.sigmas[: len(steps.timesteps) + 1].astype(np.float64)
        with np.errstate(all="ignore"):  # non-finite values are refused below
            slope = self.slope_weights(sigmas[:-1]) * np.diff(sigmas)[:, None]
        rows = np.zeros((len(slope), 1, 4))
        rows[:, 0, :2] = slope
        rows[:, 0, 0] += 1
        return self._trajectory(steps, steps, rows)

    def _unsampled(self, timesteps: F32, trained: F32, count: int) -> NDArray[Any]:
        if self.interpolation_type == "linear":
            return super()._unsampled(timesteps, trained, count)
        logs = np.log(trained)
        return np.exp(np.linspace(float(logs[-1]), float(logs[0]), count + 1).astype(np.float32))

    def _final(self, trained: F32) -> float:
        return float(trained[0]) if self.final_sigmas_type == "sigma_min" else 0.0

    def _for_model(self, timesteps: F32, sigmas: F32) -> F32:
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            return np.float32(0.25) * np.log(sigmas[:-1])  # with log_linear interpolation one more than asked for
        return timesteps
