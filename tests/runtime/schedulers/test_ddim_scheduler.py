"""The oracle is diffusers' DDIMScheduler: timesteps, coefficients, trajectories, and what it cannot do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator
from ldm_runtime.schedulers import DDIM, Clip, Threshold, Trajectory
from ldm_runtime.schedulers.ddim import FOREIGN
from tests.runtime.schedulers.scheduler_oracle import TRAINED, assert_same_trajectory, theirs

NAME = "DDIMScheduler"

TEXT2IM_LARGE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
STABLE_DIFFUSION = TEXT2IM_LARGE | {"set_alpha_to_one": False, "steps_offset": 1, "skip_prk_steps": True}
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


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mode", MODES, ids=["plain", "clip", "threshold"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_trajectories(prediction: str, mode: dict[str, Any], eta: float, steps: int) -> None:
    assert_same_trajectory(NAME, TEXT2IM_LARGE | mode | {"prediction_type": prediction}, steps, eta)


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: ",".join(f"{k}={str(v)[:9]}" for k, v in o.items()) or "as is"
)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_every_option(options: dict[str, Any], eta: float) -> None:
    for steps in (1, 13):
        assert_same_trajectory(NAME, TEXT2IM_LARGE | options, steps, eta, forced=True, tolerance=3e-6)


@pytest.mark.parametrize("config", [{}, STABLE_DIFFUSION | {"clip_sample": None}, {"num_train_timesteps": 20}])
def test_the_defaults_are_those_of_diffusers(config: dict[str, Any]) -> None:
    config = {name: value for name, value in config.items() if value is not None}
    assert_same_trajectory(NAME, config, 10, 0.5)
    expected = dict(DDIMScheduler.from_config({k: v for k, v in config.items() if k not in FOREIGN}).config)
    expected = {k: v for k, v in expected.items() if not k.startswith("_")}
    assert DDIM.from_config(config).to_config() == {"class": NAME, **expected}


def test_all_training_timesteps_as_steps() -> None:
    assert_same_trajectory(NAME, TEXT2IM_LARGE | {"num_train_timesteps": 60}, 60, 1.0)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("config", [TEXT2IM_LARGE, STABLE_DIFFUSION, TEXT2IM_LARGE | {"timestep_spacing": "trailing"}])
def test_rows_are_what_diffusers_multiplies_by(config: dict[str, Any], eta: float, prediction: str) -> None:
    """A step of diffusers is linear here: fed with (1, 0, 0), (0, 1, 0) and (0, 0, 1) it gives a, b and c."""
    config = config | {"prediction_type": prediction}
    scheduler, trajectory = theirs(NAME, config, 50), DDIM.from_config(config).trajectory(50, eta)
    unit = torch.eye(3).reshape(3, 3, 1)
    result = [
        scheduler.step(unit[1], t, unit[0], eta=eta, variance_noise=unit[2]).prev_sample.flatten().numpy()
        for t in scheduler.timesteps
    ]
    assert trajectory.rows.dtype == np.float32
    assert trajectory.rows.shape == (50, 1, 4)
    np.testing.assert_allclose(trajectory.rows[:, 0, [0, 1, 3]], np.array(result), rtol=2e-6, atol=3e-7)
    assert not trajectory.rows[:, 0, 2].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_alphas(options: dict[str, Any]) -> None:
    config = TEXT2IM_LARGE | options
    result, expected = DDIM.from_config(config).alphas_cumprod, DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    assert result.dtype == np.float32
    # Rescaling subtracts nearly equal square roots, which torch does not round correctly: its error grows there.
    tolerance = {"rtol": 0, "atol": 1e-5} if config.get("rescale_betas_zero_snr") else {"rtol": 5e-7, "atol": 0}
    np.testing.assert_allclose(result, expected, **tolerance)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("count", [1, 2, 9, 50, 97, 1000])
def test_timesteps_of_every_number_of_steps(count: int, spacing: str) -> None:
    ddim = DDIM(num_train_timesteps=count, timestep_spacing=spacing)
    scheduler, longer = DDIMScheduler(num_train_timesteps=count, timestep_spacing=spacing), 0
    for steps in range(1, count + 1):
        scheduler.set_timesteps(steps)
        assert ddim.timesteps(steps).tolist() == scheduler.timesteps.tolist()
        longer += len(scheduler.timesteps) > steps
    assert longer == (62 if (count, spacing) == (1000, "trailing") else longer)


@pytest.mark.parametrize("steps", [61, 103, 121])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("final_one", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_trailing_steps_that_end_at_timestep_minus_1(prediction: str, final_one: bool, eta: float, steps: int) -> None:
    config = TEXT2IM_LARGE | {"timestep_spacing": "trailing", "prediction_type": prediction}
    config["set_alpha_to_one"] = final_one
    trajectory = DDIM.from_config(config).trajectory(steps, eta)
    assert (len(trajectory), trajectory.timesteps[-1]) == (steps + 1, -1)
    assert_same_trajectory(NAME, config, steps, eta, forced=True)


def test_what_a_trajectory_says_of_itself() -> None:
    ddim = DDIM.from_config(TEXT2IM_LARGE)
    plain, noisy, clipped = ddim.trajectory(5), ddim.trajectory(5, 1e-30), DDIM(clip_sample_range=2).trajectory(5)
    assert (plain.needs_noise, noisy.needs_noise) == (False, True)
    assert (plain.limit_x0, clipped.limit_x0) == (None, Clip(2.0))
    assert DDIM(thresholding=True).trajectory(5).limit_x0 == Threshold(0.995, 1.0)
    assert (plain.affine, clipped.affine) == (True, False)
    assert not plain.rows[..., 3].any()
    assert (plain.init_noise_sigma, plain.input_scale.tolist()) == (1.0, [1.0] * 5)


def test_zero_terminal_snr_with_eta_1() -> None:
    """1 - ᾱ_prev - σ² is 0 there; the float32 of diffusers makes it negative on some processors, and the image NaN."""
    config = TEXT2IM_LARGE | {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    rows = DDIM.from_config(config).trajectory(50, 1.0).rows
    assert np.isfinite(rows).all()
    previous = float(theirs(NAME, config, 50).alphas_cumprod[979])
    assert rows[0, 0, -1] == pytest.approx((1 - previous) ** 0.5, rel=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "num_train_timesteps": st.integers(1, 60),
            "steps_offset": st.integers(0, 3),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "rescale_betas_zero_snr": st.booleans(),
            "set_alpha_to_one": st.booleans(),
        }
    ),
    steps=st.integers(1, 60),
    eta=st.sampled_from([0.0, 0.5, 0.99, 1.3, 4.0]),
)
def test_refuses_exactly_what_diffusers_cannot_do(options: dict[str, Any], steps: int, eta: float) -> None:
    offset = min(options["steps_offset"], options["num_train_timesteps"] - 1)
    config = {**options, "steps_offset": offset, "clip_sample": False}
    try:
        ours: Trajectory | None = DDIM.from_config(config).trajectory(steps, eta)
    except SpecError:
        ours = None
    x, out, noise = (torch.from_numpy(TorchGenerator(seed).randn((1, 1, 16))) for seed in range(3))
    try:
        scheduler = theirs(NAME, config, steps)
        moved = [scheduler.step(out, t, x, eta=eta, variance_noise=noise).prev_sample for t in scheduler.timesteps]
    except (ValueError, IndexError):
        assert ours is None, "diffusers raises"
        return
    if not torch.isfinite(torch.stack(moved)).all():
        assert ours is None, "diffusers gives NaN or inf"
        return
    assert ours is not None, "diffusers gives an image"
    for i, expected in enumerate(moved):
        result = ours.step([x.numpy()], out.numpy(), i, noise.numpy() if ours.needs_noise else None)[0]
        # Loose, as ᾱ near 1 is rescaled from square roots that torch rounds otherwise, and 1 - ᾱ is divided by.
        np.testing.assert_allclose(result, expected.numpy(), rtol=2e-3, atol=2e-3)
