"""Timesteps and options that the schedulers of consistency models share: LCM and TCD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers.foreign_options import OTHERS
from ldm_runtime.schedulers.noise_schedule import PREDICTION_TYPES, TIMESTEP_SPACINGS, NoiseSchedule
from ldm_runtime.schedulers.options import choice, fail, integer, positive, real, step_count, switch

__all__ = ["ConsistencySchedule"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class ConsistencySchedule(NoiseSchedule):
    """Base of the schedulers of consistency models, with the options they share.

    diffusers' classes have the options set_alpha_to_one, steps_offset and timestep_spacing but never use them:
    timesteps are chosen from the ``original_inference_steps`` of the distillation.

    Raises:
        SpecError: Names the option, the value and the expected values.
    """

    FOREIGN: ClassVar[Mapping[str, tuple[Any, ...] | None]] = OTHERS

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("original_inference_steps", integer, 1, self.num_train_timesteps)
        self._set("steps_offset", integer, 0, self.num_train_timesteps)
        self._set("prediction_type", choice, PREDICTION_TYPES)
        self._set("timestep_spacing", choice, TIMESTEP_SPACINGS)
        for name in ("clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr"):
            self._set(name, switch)
        for name in ("clip_sample_range", "sample_max_value", "timestep_scaling"):
            self._set(name, positive)
        self._set("dynamic_thresholding_ratio", real, 0, 1)
        if not np.isfinite(self.alphas_cumprod).all():
            raise fail("rescale_betas_zero_snr", True, "false, because these betas rescale to NaN")

    @property
    def alphas_cumprod(self) -> F32:
        """ᾱ of every training timestep, float32 [num_train_timesteps], with the same rounding as in torch."""
        return self._cumulative(self.rescale_betas_zero_snr)

    def timesteps(self, num_inference_steps: int) -> I64:
        """Return the timesteps, int64 [steps], descending.

        Raises:
            SpecError: The number of steps is not in 1..original_inference_steps.
        """
        steps, most = step_count(num_inference_steps, self.num_train_timesteps), self.original_inference_steps
        if steps > most:
            raise SpecError(f"steps: got {steps}, expected 1..{most}, the original_inference_steps of the distillation")
        distilled = np.arange(most, 0, -1) * (self.num_train_timesteps // most) - 1
        places = np.floor(np.linspace(0, most, num=steps, endpoint=False)).astype(np.int64)
        return np.asarray(distilled[places], np.int64)
