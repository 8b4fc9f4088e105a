"""Options of the schedulers that one set of tests compares with diffusers: single ones, and any combination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.runtime.schedulers.scheduler_oracle import TRAINED

__all__ = ["CASES", "Case"]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("linspace", "leading", "trailing")
RESAMPLED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": TRAINED},
    {"num_train_timesteps": 177},
]
SIGMA_OPTIONS = [
    {},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction"},
    *BETAS,
]
RESAMPLED_OPTIONS = [
    *SIGMA_OPTIONS,
    {"prediction_type": "sample"},
    *({name: True} for name in RESAMPLED),
    *({name: True, "sigma_min": 0.05, "sigma_max": 9.0} for name in RESAMPLED),
    {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
]
CONSISTENCY_OPTIONS: list[dict[str, Any]] = [
    {},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"original_inference_steps": 100},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "trailing"},
    *BETAS,
]


@dataclass(frozen=True)
class Case:
    """How a scheduler is compared.

    Args:
        options: Options to try one after the other.
        combined: Strategy of each option that is tried in combinations.
        etas: Values of eta to try.
        tolerance: Of x, relative to its largest magnitude, where each call starts from the x of diffusers.
        drift: The same where the calls follow one another.
        slots: Arrays of the state.
        most: Most steps, if fewer than training timesteps.
    """

    options: list[dict[str, Any]]
    combined: dict[str, st.SearchStrategy[Any]]
    etas: tuple[float, ...] = (0.0,)
    tolerance: float = 1e-5
    drift: float = 3e-5
    slots: int = 1
    most: str = "num_train_timesteps"


_COMMON: dict[str, st.SearchStrategy[Any]] = {
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    "prediction_type": st.sampled_from(PREDICTIONS),
}
_SPACED = {**_COMMON, "timestep_spacing": st.sampled_from(SPACINGS), "steps_offset": st.integers(0, 1)}
_SOLVED = {
    **_SPACED,
    "solver_order": st.integers(1, 3),
    "solver_type": st.sampled_from(["bh1", "bh2"]),
    "predict_x0": st.booleans(),
    "lower_order_final": st.booleans(),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "disable_corrector": st.lists(st.integers(0, 5), max_size=3),
    "use_exponential_sigmas": st.booleans(),
    "rescale_betas_zero_snr": st.booleans(),
    "thresholding": st.booleans(),
}
_RESAMPLED = {**_SPACED, "spacing": st.sampled_from(["", *RESAMPLED])}
_DISTILLED = {**_COMMON, "original_inference_steps": st.integers(1, 60), "rescale_betas_zero_snr": st.booleans()}

CASES: dict[str, Case] = {
    "EulerDiscreteScheduler": Case(
        [
            *RESAMPLED_OPTIONS,
            ZERO_SNR,
            {"interpolation_type": "log_linear"},
            {"interpolation_type": "log_linear", "use_karras_sigmas": True},
            {"final_sigmas_type": "sigma_min"},
            {"timestep_type": "continuous"},
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
        ],
        _RESAMPLED
        | {
            "interpolation_type": st.sampled_from(["linear", "log_linear"]),
            "timestep_type": st.sampled_from(["discrete", "continuous"]),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
            "rescale_betas_zero_snr": st.booleans(),
        },
    ),
    "EulerAncestralDiscreteScheduler": Case(
        [*SIGMA_OPTIONS, ZERO_SNR], {**_SPACED, "rescale_betas_zero_snr": st.booleans()}
    ),
    "LMSDiscreteScheduler": Case(RESAMPLED_OPTIONS, _RESAMPLED, tolerance=2e-5, drift=1e-4, slots=4),
    "HeunDiscreteScheduler": Case(
        [
            *RESAMPLED_OPTIONS,
            {"beta_schedule": "exp"},
            {"clip_sample": True},
            {"clip_sample": True, "clip_sample_range": 2.0, "prediction_type": "v_prediction"},
        ],
        _RESAMPLED | {"clip_sample": st.booleans()},
        tolerance=1e-4,  # diffusers divides a difference of float32 numbers by the smaller sigma of a step
        drift=1e-4,
        slots=2,
    ),
    "DDPMScheduler": Case(
        [
            {},
            *({"clip_sample": False} | options for options in SIGMA_OPTIONS),
            {"clip_sample": False, "prediction_type": "sample"},
            {"clip_sample": False, "beta_schedule": "sigmoid"},
            {"clip_sample": False, "beta_schedule": "laplace"},
            {"clip_sample": False, "variance_type": "fixed_small_log"},
            {"clip_sample": False, "variance_type": "fixed_large"},
            {"clip_sample": False, **ZERO_SNR},
            {"clip_sample_range": 0.5, "prediction_type": "v_prediction"},
            {"thresholding": True, "sample_max_value": 2.0, "dynamic_thresholding_ratio": 0.9},
        ],
        _SPACED
        | {
            "variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large"]),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]),
            "clip_sample": st.booleans(),
            "thresholding": st.booleans(),
            "rescale_betas_zero_snr": st.booleans(),
        },
    ),
    "UniPCMultistepScheduler": Case(
        [
            *SIGMA_OPTIONS,
            ZERO_SNR,
            {"prediction_type": "sample"},
            {"solver_order": 1},
            {"solver_order": 3},
            {"solver_order": 4},
            {"use_karras_sigmas": True},
            {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
            {"use_exponential_sigmas": True},
            {"use_beta_sigmas": True},
            {"final_sigmas_type": "sigma_min"},
            {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
            {"solver_type": "heun"},
            {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
            {"disable_corrector": [0, 2]},
            {"thresholding": True, "sample_max_value": 2.0},
            *({"predict_x0": False, "final_sigmas_type": "sigma_min", "prediction_type": p} for p in PREDICTIONS),
        ],
        _SOLVED,
        tolerance=3e-5,
        drift=1e-4,
        slots=4,
    ),
    "LCMScheduler": Case(
        [
            *CONSISTENCY_OPTIONS,
            {"timestep_scaling": 0.01},
            {"clip_sample": True, "clip_sample_range": 0.5},
            {"thresholding": True, "sample_max_value": 2.0},
        ],
        _DISTILLED | {"clip_sample": st.booleans(), "timestep_scaling": st.sampled_from([0.1, 10.0])},
        most="original_inference_steps",
    ),
    "TCDScheduler": Case(
        CONSISTENCY_OPTIONS, _DISTILLED, etas=(0.0, 0.3, 1.0), drift=1e-4, most="original_inference_steps"
    ),
}
"""Class name -> how the scheduler is compared."""
