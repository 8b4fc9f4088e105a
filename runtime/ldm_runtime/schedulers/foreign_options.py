"""Options of other diffusers schedulers that a scheduler ignores, because their values have no effect on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_runtime.schedulers.noise_schedule import EARLY_KEYS, SIGMA_KEYS

__all__ = ["OTHERS"]

OTHERS: Mapping[str, tuple[Any, ...] | None] = {
    **EARLY_KEYS,
    **SIGMA_KEYS,
    "skip_prk_steps": None,  # PNDM
    "set_alpha_to_one": None,
    "clip_sample": None,  # DDIM; diffusers keeps it in configs of schedulers that never clip
    "clip_sample_range": None,
    "thresholding": (None, False),
    "dynamic_thresholding_ratio": None,
    "sample_max_value": None,
    "rescale_betas_zero_snr": (None, False),
    "solver_order": None,  # from here on DPM-Solver and UniPC
    "solver_type": None,
    "algorithm_type": None,
    "lower_order_final": None,
    "euler_at_final": None,
    "lambda_min_clipped": None,
    "use_lu_lambdas": (None, False),
    "predict_x0": None,
    "disable_corrector": None,
    "solver_p": (None,),
    "use_flow_sigmas": (None, False),
    "flow_shift": None,
    "use_dynamic_shifting": (None, False),
    "time_shift_type": None,
    "shift_terminal": (None,),
    "original_inference_steps": None,  # LCM and TCD
    "timestep_scaling": None,
}
"""Option -> values that have no effect; None for any value. A scheduler's own options take precedence."""
