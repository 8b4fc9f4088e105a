"""The oracle is diffusers' DDIMScheduler: timesteps, coefficients, trajectories, and what it cannot do."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.ddim import DDIM, FOREIGN, MAX_TRAIN_TIMESTEPS
from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator
from ldm_runtime.schedule import Schedule

TEXT2IM_LARGE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
STABLE_DIFFUSION = TEXT2IM_LARGE | {"set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}
TRAINED = np.linspace(0.001, 0.03, 1000).tolist()
OPTIONS: list[dict[str, Any]] = [
    {},
    {"steps_offset": 1},
    {"set_alpha_to_one": False},
    {"set_alpha_to_one": False, "steps_offset": 1},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_start": 0.0001, "beta_end": 0.02},
    {"beta_start": 0.02, "beta_end": 0.01},
    {"trained_betas": TRAINED},
    {"num_train_timesteps": 77},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False},
    {"rescale_betas_zero_snr": True},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "sample"},
    {"clip_sample": True, "clip_sample_range": 0.5},
    {"clip_sample": True, "clip_sample_range": 3},
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 0.8},
    {"thresholding": True, "sample_max_value": 4.0, "dynamic_thresholding_ratio": 0.3},
    {"thresholding": True, "sample_max_value": 4.0, "dynamic_thresholding_ratio": 1.0, "clip_sample": True},
]
MODES = [{}, {"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.5}]
BAD_NUMBERS = ["0.1", True, None, float("nan"), float("inf"), -float("inf"), -1.0, 10**400]


def theirs(config: dict[str, Any], steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def model(x: np.ndarray, timestep: int) -> np.ndarray:
    """A smooth stand-in for a UNet: any function of x and t serves."""
    return (0.8 * np.sin(1.3 * x + 0.01 * timestep) + 0.1 * x).astype(np.float32)


def assert_same_trajectory(config: dict[str, Any], steps: int, eta: float, forced: bool = False) -> None:
    """Both samplers from one seed, each with its own noise stream and its own x; ``forced``: both with diffusers' x."""
    scheduler, schedule = theirs(config, steps), DDIM.from_config(config).schedule(steps, eta)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    torch_generator, generator, shape = torch.Generator().manual_seed(3), TorchGenerator(3), (2, 4, 6, 8)
    x, y = torch.randn(shape, generator=torch_generator), generator.randn(shape)
    for i, timestep in enumerate(scheduler.timesteps.tolist()):
        y = x.numpy() if forced else y
        output = torch.from_numpy(model(x.numpy(), timestep))
        x = scheduler.step(output, timestep, x, eta=eta, generator=torch_generator).prev_sample
        noise = generator.randn(shape) if schedule.needs_noise else None
        y = schedule.step(y, model(y, timestep), i, noise)
        assert y.dtype == np.float32
        size = max(1.0, float(x.abs().max()))
        np.testing.assert_allclose(
            y, x.numpy(), rtol=0, atol=(3e-6 if forced else 1e-5) * size, err_msg=f"step {i} of {steps}, eta {eta}"
        )
    np.testing.assert_allclose(generator.randn((16,)), torch.randn(16, generator=torch_generator), rtol=0, atol=3e-6)


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mode", MODES, ids=["plain", "clip", "threshold"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_trajectories(prediction: str, mode: dict[str, Any], eta: float, steps: int) -> None:
    assert_same_trajectory(TEXT2IM_LARGE | mode | {"prediction_type": prediction}, steps, eta)


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: ",".join(f"{k}={str(v)[:9]}" for k, v in o.items()) or "as is"
)
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("steps", [1, 13, 50])
def test_every_option(options: dict[str, Any], eta: float, steps: int) -> None:
    assert_same_trajectory(TEXT2IM_LARGE | options, steps, eta, forced=True)


@pytest.mark.parametrize("config", [{}, STABLE_DIFFUSION | {"clip_sample": None}, {"num_train_timesteps": 20}])
def test_the_defaults_are_those_of_diffusers(config: dict[str, Any]) -> None:
    config = {name: value for name, value in config.items() if value is not None}
    assert_same_trajectory(config, 10, 0.5)
    expected = dict(DDIMScheduler.from_config({k: v for k, v in config.items() if k not in FOREIGN}).config)
    assert DDIM.from_config(config).to_config() == {k: v for k, v in expected.items() if not k.startswith("_")}


def test_all_training_timesteps_as_steps() -> None:
    assert_same_trajectory(TEXT2IM_LARGE | {"num_train_timesteps": 60}, 60, 1.0)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("config", [TEXT2IM_LARGE, STABLE_DIFFUSION, TEXT2IM_LARGE | {"timestep_spacing": "trailing"}])
def test_rows_are_what_diffusers_multiplies_by(config: dict[str, Any], eta: float, prediction: str) -> None:
    """A step of diffusers is linear here: fed with (1, 0, 0), (0, 1, 0) and (0, 0, 1) it gives a, b and c."""
    config = config | {"prediction_type": prediction}
    scheduler, schedule = theirs(config, 50), DDIM.from_config(config).schedule(50, eta)
    unit = torch.eye(3).reshape(3, 3, 1)
    found = [
        scheduler.step(unit[1], t, unit[0], eta=eta, variance_noise=unit[2]).prev_sample.flatten().numpy()
        for t in scheduler.timesteps
    ]
    assert schedule.rows.dtype == np.float32
    np.testing.assert_allclose(schedule.rows, np.array(found), rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_alphas(options: dict[str, Any]) -> None:
    config = TEXT2IM_LARGE | options
    found, expected = DDIM.from_config(config).alphas_cumprod, DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    assert found.dtype == np.float32
    # Rescaling subtracts nearly equal square roots, which torch does not round correctly: its error grows there.
    tolerance = {"rtol": 0, "atol": 1e-5} if config.get("rescale_betas_zero_snr") else {"rtol": 5e-7, "atol": 0}
    np.testing.assert_allclose(found, expected, **tolerance)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("count", [1, 2, 9, 50, 97, 1000])
def test_timesteps_of_every_number_of_steps(count: int, spacing: str) -> None:
    ddim = DDIM(num_train_timesteps=count, timestep_spacing=spacing)
    scheduler, refused = DDIMScheduler(num_train_timesteps=count, timestep_spacing=spacing), 0
    for steps in range(1, count + 1):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()
        if len(expected) == steps:
            assert ddim.timesteps(steps).tolist() == expected
            continue
        refused += 1
        assert spacing == "trailing"
        assert expected[-1] == -1
        with pytest.raises(SpecError, match=rf"^steps: got {steps}, .*'trailing' rounds to {steps + 1} .*down to -1"):
            ddim.timesteps(steps)
    assert refused == (62 if (count, spacing) == (1000, "trailing") else refused)


def test_what_a_schedule_says_of_itself() -> None:
    ddim = DDIM.from_config(TEXT2IM_LARGE)
    plain, noisy, clipped = ddim.schedule(5), ddim.schedule(5, 1e-30), DDIM().schedule(5)
    assert (plain.needs_noise, noisy.needs_noise) == (False, True)
    assert (plain.affine, clipped.affine, DDIM(clip_sample=False, thresholding=True).schedule(5).affine) == (1, 0, 0)
    assert plain.rows.shape == (5, 3)
    assert plain.timesteps.dtype == np.int64
    assert not plain.rows[:, 2].any()
    with pytest.raises(SpecError, match="clip_sample or thresholding is on"):
        _ = clipped.rows
    with pytest.raises(ValueError, match="read-only"):
        plain.timesteps[0] = 1


def test_step_leaves_its_inputs_alone() -> None:
    for ddim in (DDIM(), DDIM(clip_sample=False), DDIM(thresholding=True)):
        arrays = [TorchGenerator(seed).randn((1, 2, 4)) for seed in range(3)]
        copies = [array.copy() for array in arrays]
        result = ddim.schedule(3, 1.0).step(arrays[0], arrays[1], 1, arrays[2])
        assert not any(np.shares_memory(result, array) for array in arrays)
        assert all(np.array_equal(array, copy) for array, copy in zip(arrays, copies, strict=True))


def test_zero_terminal_snr_with_eta_1_where_diffusers_gives_nan() -> None:
    """1 - ᾱ_prev - σ² is 0 there; the float32 of diffusers makes it negative."""
    config = TEXT2IM_LARGE | {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    schedule = DDIM.from_config(config).schedule(50, 1.0)
    assert schedule.direction[0] == 0
    assert np.isfinite(schedule.rows).all()
    scheduler, x = theirs(config, 50), torch.ones(1, 4, 8)
    assert scheduler.step(x, 999, x, eta=1.0, variance_noise=x).prev_sample.isnan().all()


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 60),
    steps=st.integers(1, 60),
    offset=st.integers(0, 3),
    eta=st.sampled_from([0.0, 0.5, 0.99, 1.3, 4.0]),
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    spacing=st.sampled_from(["leading", "linspace", "trailing"]),
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    rescale=st.booleans(),
    final_one=st.booleans(),
)
def test_refuses_exactly_what_diffusers_cannot_do(
    count: int,
    steps: int,
    offset: int,
    eta: float,
    schedule: str,
    spacing: str,
    prediction: str,
    rescale: bool,
    final_one: bool,
) -> None:
    config = {
        "num_train_timesteps": count,
        "steps_offset": min(offset, count - 1),
        "beta_schedule": schedule,
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "rescale_betas_zero_snr": rescale,
        "set_alpha_to_one": final_one,
        "clip_sample": False,
    }
    try:
        ours: Schedule | None = DDIM.from_config(config).schedule(steps, eta)
    except SpecError:
        ours = None
    x, out, noise = (torch.from_numpy(TorchGenerator(seed).randn((1, 1, 16))) for seed in range(3))
    try:
        scheduler = theirs(config, steps)
        moved = [scheduler.step(out, t, x, eta=eta, variance_noise=noise).prev_sample for t in scheduler.timesteps]
    except (ValueError, IndexError):
        assert ours is None, "diffusers raises"
        return
    if -1 in scheduler.timesteps:
        assert ours is None, "diffusers goes on to timestep -1"
        return
    if not torch.isfinite(torch.stack(moved)).all():
        assert ours is None, "diffusers gives NaN or inf"
        return
    assert ours is not None, "diffusers gives an image"
    for i, expected in enumerate(moved):
        found = ours.step(x.numpy(), out.numpy(), i, noise.numpy() if ours.needs_noise else None)
        # Loose, as ᾱ near 1 is rescaled from square roots that torch rounds otherwise, and 1 - ᾱ is divided by.
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=2e-3)


# Refusals: the message names the option and what it got.


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
            for v in (0, 1, "true", None)
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
    assert len(message) < 300
    if not isinstance(value, list):
        assert repr(value)[:10] in message


@pytest.mark.parametrize(
    "name",
    ["shift", "solver_order", "Clip_sample", "beta", "", "algorithm_type", "x" * 9999, 3],
    ids=lambda n: str(n)[:9],
)
def test_unknown_options_refused(name: Any) -> None:
    with pytest.raises(SpecError, match=r"^scheduler: unknown option .*num_train_timesteps") as caught:
        DDIM.from_config(TEXT2IM_LARGE | {name: 1})
    assert str(name)[:5] in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("config", [None, [], "DDIMScheduler", 3, [("beta_start", 0.1)]])
def test_what_is_no_config_is_refused(config: Any) -> None:
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
    with pytest.raises(SpecError, match=rf"^scheduler: {name}: got .*which DDIM lacks; expected one of") as caught:
        DDIM.from_config(TEXT2IM_LARGE | {name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("options", [*OPTIONS, {"_diffusers_version": "0.4", "_anything": [1]}], ids=str)
def test_config_there_and_back(options: dict[str, Any]) -> None:
    ddim = DDIM.from_config(TEXT2IM_LARGE | options)
    text = json.dumps(ddim.to_config())
    assert DDIM.from_config(json.loads(text)) == ddim
    back = DDIMScheduler.from_config(json.loads(text))
    assert {name: back.config[name] for name in ddim.to_config()} == ddim.to_config()


@pytest.mark.parametrize("steps", [0, -1, 1001, 50.0, "50", True, None])
def test_steps_refused(steps: Any) -> None:
    with pytest.raises(SpecError, match=r"^steps: got .*, expected 1\.\.1000") as caught:
        DDIM().schedule(steps)
    assert repr(steps) in str(caught.value)


@pytest.mark.parametrize("eta", [-0.1, *BAD_NUMBERS])
def test_etas_refused(eta: Any) -> None:
    with pytest.raises(SpecError, match=r"^eta: got .*, expected a finite number >= 0") as caught:
        DDIM().schedule(10, eta)
    assert repr(eta)[:10] in str(caught.value)


@pytest.mark.parametrize("eta", [1.03, 1.2, 2, 1e30])
def test_an_eta_that_outweighs_its_step_is_refused_and_the_highest_told(eta: float) -> None:
    ddim = DDIM.from_config(TEXT2IM_LARGE)
    with pytest.raises(SpecError, match=r"^eta: got .* with 50 steps, expected at most 1\.0\d+: at timestep") as caught:
        ddim.schedule(50, eta)
    assert f"got {eta:g}" in str(caught.value)
    highest = float(str(caught.value).split("at most ")[1].split(":")[0])
    assert np.isfinite(ddim.schedule(50, highest).rows).all()
    assert ddim.schedule(1, eta).rows[0, 2] == 0  # a single step goes to ᾱ = 1, where no noise is left


def test_an_offset_beyond_the_last_timestep_is_refused() -> None:
    ddim = DDIM.from_config(STABLE_DIFFUSION)
    with pytest.raises(SpecError, match=r"^steps_offset: got 1 with 1000 steps: timestep 1000, expected at most 999"):
        ddim.schedule(1000)
    assert ddim.schedule(999).timesteps[0] == 999


@pytest.mark.parametrize("clip", [False, True])
def test_zero_terminal_snr_with_epsilon_is_refused_where_it_divides_by_zero(clip: bool) -> None:
    """Clipped, diffusers gives the sign of x - eps: finite, and decided by rounding."""
    config = TEXT2IM_LARGE | {"rescale_betas_zero_snr": True, "clip_sample": clip}
    with pytest.raises(
        SpecError, match=r"timestep 999: got alpha_cumprod 0, .*'epsilon' divides by zero.*v_prediction"
    ):
        DDIM.from_config(config | {"timestep_spacing": "trailing"}).schedule(50)
    assert_same_trajectory(config, 50, 0.0)  # leading spacing ends at 980


def test_betas_too_small_for_float32_are_refused() -> None:
    with pytest.raises(SpecError, match=r"timestep 900: got alpha_cumprod 1, .*'sample' divides by zero"):
        DDIM(beta_start=1e-12, beta_end=1e-12, prediction_type="sample").schedule(10)


def test_betas_that_cannot_be_rescaled_are_refused() -> None:
    with pytest.raises(SpecError, match="rescale_betas_zero_snr: got true"):
        DDIM(num_train_timesteps=1, rescale_betas_zero_snr=True)


def test_steps_misused() -> None:
    x = TorchGenerator(0).randn((1, 4, 8))
    plain, noisy = DDIM(clip_sample=False).schedule(5), DDIM(clip_sample=False).schedule(5, 0.5)
    for i in (-1, 5, 1.0, None):
        with pytest.raises(SpecError, match=rf"got step {i!r}, expected 0\.\.4"):
            plain.step(x, x, i)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"noise: got some, expected none with eta 0$"):
        plain.step(x, x, 0, x)
    with pytest.raises(SpecError, match=r"noise: got none, expected some with eta 0\.5$"):
        noisy.step(x, x, 0)
    with pytest.raises(SpecError, match=r"model_output: got float16 \[1, 4, 8\], expected float32"):
        plain.step(x, x.astype(np.float16), 0)
    with pytest.raises(SpecError, match=r"x: got float64 \[1, 4, 8\], expected float32"):
        plain.step(x.astype(np.float64), x, 0)
    with pytest.raises(SpecError, match=r"model_output: got float32 \[2, 4, 8\], expected the shape of x, \[1, 4, 8\]"):
        plain.step(x, np.concatenate([x, x]), 0)
    with pytest.raises(SpecError, match=r"noise: got float32 \[4, 8\], expected the shape of x"):
        noisy.step(x, x, 0, x[0])
    with pytest.raises(SpecError, match=r"x: got float32 \[8\], expected float32 \[batch, \.\.\.\]"):
        plain.step(x[0, 0], x[0, 0], 0)
    with pytest.raises(SpecError, match=r"x: got float32 \[0, 4, 8\]"):
        plain.step(x[:0], x[:0], 0)
