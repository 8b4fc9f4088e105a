"""The oracle is diffusers' DDIMScheduler: timesteps, coefficients, trajectories, and what it cannot do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.ddim import DDIM, FOREIGN
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
