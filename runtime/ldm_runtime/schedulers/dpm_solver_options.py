"""Values that the options of DPMSolverMultistep take, and options of other schedulers that it ignores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_runtime.schedulers.noise_schedule import EARLY_KEYS, TIMESTEP_SPACINGS

__all__ = ["CHOICES", "FOREIGN", "RENAMED", "SWITCHES"]

SWITCHES = (
    "thresholding",
    "lower_order_final",
    "euler_at_final",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "rescale_betas_zero_snr",
)
CHOICES = {
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
    "solver_type": ("midpoint", "heun"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_spacing": TIMESTEP_SPACINGS,
}
RENAMED = {  # names of other solvers, which diffusers takes for these
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
}

FOREIGN: Mapping[str, tuple[Any, ...] | None] = {
    **EARLY_KEYS,
    "skip_prk_steps": None,  # PNDM
    "set_alpha_to_one": None,
    "clip_sample": None,  # DDIM; diffusers keeps it in configs of DPM-Solver, which never clips
    "clip_sample_range": None,
    "use_flow_sigmas": (None, False),
    "flow_shift": None,  # read with use_flow_sigmas only
    "use_dynamic_shifting": None,
    "time_shift_type": None,
}
