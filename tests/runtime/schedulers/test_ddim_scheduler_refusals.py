"""Scheduler configurations, steps and etas that DDIM refuses: the message names the option and what it got."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import shown
from ldm_runtime.schedulers import DDIM
from ldm_runtime.schedulers.ddim import FOREIGN
from ldm_runtime.schedulers.noise_schedule import MAX_TRAIN_TIMESTEPS
from tests.runtime.schedulers.scheduler_oracle import TRAINED, assert_same_trajectory
from tests.runtime.schedulers.test_ddim_scheduler import NAME, OPTIONS, STABLE_DIFFUSION, TEXT2IM_LARGE

BAD_NUMBERS = ["0.1", True, None, float("nan"), float("inf"), -float("inf"), -1.0, 10**400]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("num_train_timesteps", v) for v in (0, -1, MAX_TRAIN_TIMESTEPS + 1, 1000.0, "1000", True, None, 10**400)],
        *[("steps_offset", v) for v in (-1, 1000, 1.0, "1", False, None)],
        *[(name, v) for name in ("beta_start", "beta_end") for v in [0, 0.0, 1, 1.0, *BAD_NUMBERS]],
        *[(name, v) for name in ("clip_sample_range", "sample_max_value") for v in [0, 1e39, *BAD_NUMBERS]],
        *[("dynamic_thresholding_ratio", v) for v in [1.0001, *BAD_NUMBERS]],
        *[
            (name, v)
            for name in ("clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr")
            for v in (2, -1, "true", 1.0, [])
        ],
        *[("beta_schedule", v) for v in ("sigmoid", "Linear", "", None, 3, ["linear"])],
        *[("prediction_type", v) for v in ("v", "flow_prediction", None, {})],
        *[("timestep_spacing", v) for v in ("karras", None, [])],
        *[("trained_betas", v) for v in (TRAINED[:-1], [*TRAINED, 0.1], [], "linear", 0.1, {}, [[0.1]] * 1000)],
        *[("trained_betas", [*TRAINED[:-1], bad]) for bad in [0.0, 1.0, *BAD_NUMBERS]],
    ],
    ids=lambda v: repr(v)[:20],
)
def test_values_refused(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"^scheduler: {name}: got .*, expected ") as caught:
        DDIM.from_config(TEXT2IM_LARGE | {name: value})
    message = str(caught.value)
    assert len(message) <= 300
    if not isinstance(value, list):
        assert shown(value)[:10] in message


@pytest.mark.parametrize(
    "name",
    ["shift", "solver_order", "Clip_sample", "beta", "", "algorithm_type", "x" * 9999, 3],
    ids=lambda n: str(n)[:9],
)
def test_unknown_options_refused(name: Any) -> None:
    with pytest.raises(SpecError, match=r"^scheduler: unknown option .*DDIMScheduler, such as ") as caught:
        DDIM.from_config(TEXT2IM_LARGE | {name: 1})
    assert str(name)[:5] in str(caught.value)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("config", [None, [], "DDIMScheduler", 3, [("beta_start", 0.1)]])
def test_invalid_configs_are_refused(config: Any) -> None:
    with pytest.raises(SpecError, match=r"^scheduler: got .*, expected an object"):
        DDIM.from_config(config)


@pytest.mark.parametrize("name", FOREIGN)
def test_options_of_other_schedulers(name: str) -> None:
    """Their harmless values change nothing; diffusers ignores them as well."""
    for value in FOREIGN[name] or (None, True, "pt"):
        assert DDIM.from_config(TEXT2IM_LARGE | {name: value}) == DDIM.from_config(TEXT2IM_LARGE)
    assert name not in DDIM.from_config(TEXT2IM_LARGE).to_config()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timestep_values", [999, 500, 1]),
        ("variance_type", "learned_range"),
        ("timestep_type", "continuous"),
        ("sigma_min", 0.002),
        ("sigma_max", 80.0),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
    ],
)
def test_options_of_other_schedulers_that_would_be_lost(name: str, value: object) -> None:
    with pytest.raises(
        SpecError, match=rf"^scheduler: {name}: got .*which DDIMScheduler lacks; expected one of"
    ) as caught:
        DDIM.from_config(TEXT2IM_LARGE | {name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("options", [*OPTIONS, {"_diffusers_version": "0.4", "_anything": [1]}], ids=str)
def test_config_there_and_back(options: dict[str, Any]) -> None:
    ddim = DDIM.from_config(TEXT2IM_LARGE | options)
    text = json.dumps(ddim.to_config())
    assert DDIM.from_config(json.loads(text)) == ddim
    back = DDIMScheduler.from_config({name: v for name, v in json.loads(text).items() if name != "class"})
    assert {name: back.config[name] for name in ddim.to_config() if name != "class"} | {
        "class": NAME
    } == ddim.to_config()


@pytest.mark.parametrize("steps", [0, -1, 1001, 50.0, "50", True, None])
def test_steps_refused(steps: Any) -> None:
    with pytest.raises(SpecError, match=r"^steps: got .*, expected 1\.\.1000") as caught:
        DDIM().trajectory(steps)
    assert repr(steps) in str(caught.value)


@pytest.mark.parametrize("eta", [-0.1, *BAD_NUMBERS])
def test_etas_refused(eta: Any) -> None:
    with pytest.raises(SpecError, match=r"^eta: got .*, expected a finite number >= 0") as caught:
        DDIM().trajectory(10, eta)
    assert shown(eta)[:10] in str(caught.value)


@pytest.mark.parametrize("eta", [1.03, 1.2, 2, 1e30])
def test_an_eta_too_large_for_its_step_is_refused_with_the_highest_allowed(eta: float) -> None:
    ddim = DDIM.from_config(TEXT2IM_LARGE)
    with pytest.raises(SpecError, match=r"^eta: got .* with 50 steps, expected at most 1\.0\d+: at timestep") as caught:
        ddim.trajectory(50, eta)
    assert f"got {eta:g}" in str(caught.value)
    highest = float(str(caught.value).split("at most ")[1].split(":")[0])
    assert np.isfinite(ddim.trajectory(50, highest).rows).all()
    assert ddim.trajectory(1, eta).rows[0, 0, 3] == 0  # a single step goes to ᾱ = 1, where no noise is left


def test_an_offset_beyond_the_last_timestep_is_refused() -> None:
    ddim = DDIM.from_config(STABLE_DIFFUSION)
    with pytest.raises(SpecError, match=r"^steps_offset: got 1 with 1000 steps: timestep 1000, expected at most 999"):
        ddim.trajectory(1000)
    assert ddim.trajectory(999).timesteps[0] == 999


@pytest.mark.parametrize("clip", [False, True])
def test_zero_terminal_snr_with_epsilon_is_refused_where_it_divides_by_zero(clip: bool) -> None:
    """Clipped, diffusers gives the sign of x - eps: finite, and decided by rounding."""
    config = TEXT2IM_LARGE | {"rescale_betas_zero_snr": True, "clip_sample": clip}
    with pytest.raises(
        SpecError, match=r"timestep 999: got alpha_cumprod 0, .*'epsilon' divides by zero.*v_prediction"
    ):
        DDIM.from_config(config | {"timestep_spacing": "trailing"}).trajectory(50)
    assert_same_trajectory(NAME, config, 50, 0.0)  # leading spacing ends at 980


def test_betas_too_small_for_float32_are_refused() -> None:
    with pytest.raises(SpecError, match=r"timestep 900: got alpha_cumprod 1, .*'sample' divides by zero"):
        DDIM(beta_start=1e-12, beta_end=1e-12, prediction_type="sample").trajectory(10)


def test_betas_that_cannot_be_rescaled_are_refused() -> None:
    with pytest.raises(SpecError, match="rescale_betas_zero_snr: got true"):
        DDIM(num_train_timesteps=1, rescale_betas_zero_snr=True)


def test_numbers_of_numpy_are_accepted() -> None:
    plain = DDIM.from_config(TEXT2IM_LARGE | {"trained_betas": TRAINED, "steps_offset": 1})
    options = {"trained_betas": np.array(TRAINED), "steps_offset": np.int8(1), "num_train_timesteps": np.int64(1000)}
    options |= {"clip_sample": np.bool_(False), "beta_end": np.float64(0.012)}
    assert DDIM.from_config(TEXT2IM_LARGE | options) == plain
    json.dumps(DDIM.from_config(TEXT2IM_LARGE | options).to_config())
    ours = plain.trajectory(np.int32(7), np.float64(0.5))  # type: ignore[arg-type]
    assert np.array_equal(ours.rows, plain.trajectory(7, 0.5).rows)


def test_0_1_and_null_are_switches_as_in_diffusers() -> None:
    for value, expected in ((0, False), (1, True), (None, False)):
        assert DDIM.from_config(TEXT2IM_LARGE | {"clip_sample": value}) == DDIM(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=expected
        )
