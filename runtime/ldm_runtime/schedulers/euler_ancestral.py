"""Euler's method with ancestral noise, as diffusers' EulerAncestralDiscreteScheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.schedulers.options import fail, switch
from ldm_runtime.schedulers.sigma_schedule import SigmaSchedule
from ldm_runtime.schedulers.trajectory import Trajectory

__all__ = ["EulerAncestral"]

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class EulerAncestral(SigmaSchedule):
    """Configuration of an EulerAncestralDiscreteScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values. As in diffusers, models that predict the sample
            are not supported.
    """

    CLASS: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    PREDICTION_TYPES: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")

    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("rescale_betas_zero_snr", switch)
        if not np.isfinite(self.alphas_cumprod).all():
            raise fail("rescale_betas_zero_snr", True, "false, because these betas rescale to NaN")

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps]; the last is 2**-24 if rescaled to zero SNR."""
        return self._cumulative_above_zero(self.rescale_betas_zero_snr)

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory. Its state is x alone; every call draws noise, the last with weight zero.

        Args:
            num_inference_steps: 1..num_train_timesteps.
            eta: Ignored; the noise does not depend on it.

        Raises:
            SpecError: The number of steps is out of range, or a sigma is zero where the method divides by it.
        """
        steps = self.steps(num_inference_steps)
        before, after = steps.sigmas[:-1], steps.sigmas[1:]
        with np.errstate(all="ignore"):  # non-finite values are refused below
            up = np.sqrt(after**2 * (before**2 - after**2) / before**2)  # in float32, which decides the digits of down
            down = np.sqrt(after**2 - up**2)
            slope = self.slope_weights(before.astype(np.float64)) * (down - before).astype(np.float64)[:, None]
        rows = np.zeros((len(slope), 1, 4))
        rows[:, 0, :2] = slope
        rows[:, 0, 0] += 1
        rows[:, 0, 3] = up
        return self._trajectory(steps, steps, rows, noise=True)
