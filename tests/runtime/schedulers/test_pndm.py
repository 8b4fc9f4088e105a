"""The oracle is diffusers' PNDMScheduler: timesteps, trajectories and what it cannot do."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator
from ldm_runtime.schedulers import PNDM
from ldm_runtime.schedulers.pndm import FOREIGN
from tests.runtime.schedulers.scheduler_oracle import LATENT_DIFFUSION, TRAINED, assert_same_trajectory, theirs

NAME = "PNDMScheduler"
STABLE_DIFFUSION = LATENT_DIFFUSION | {
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"set_alpha_to_one": True},
    {"steps_offset": 1},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_start": 0.02, "beta_end": 0.01},
    {"trained_betas": TRAINED},
    {"num_train_timesteps": 77},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "trailing", "set_alpha_to_one": True, "prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={str(v)[:9]}" for k, v in o.items()) or "-")
@pytest.mark.parametrize("steps", [4, 5, 13, 50, 60])
@pytest.mark.parametrize("skip", [True, False])
def test_every_option(options: dict[str, Any], steps: int, skip: bool) -> None:
    config = LATENT_DIFFUSION | {"skip_prk_steps": skip} | options
    assert_same_trajectory(NAME, config, steps, forced=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("steps", [4, 13, 50])
def test_trajectories(prediction: str, skip: bool, steps: int) -> None:
    assert_same_trajectory(NAME, LATENT_DIFFUSION | {"prediction_type": prediction, "skip_prk_steps": skip}, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20, 50, 103, 999])
def test_stable_diffusion(steps: int) -> None:
    assert_same_trajectory(NAME, STABLE_DIFFUSION, steps, eta=0.7)


def test_calls() -> None:
    assert [len(PNDM(skip_prk_steps=True).trajectory(steps)) for steps in (1, 2, 50)] == [1, 3, 51]
    assert [len(PNDM().trajectory(steps)) for steps in (4, 50)] == [13, 59]
    trajectory = PNDM(skip_prk_steps=True).trajectory(50)
    assert (trajectory.slots, trajectory.affine, trajectory.needs_noise) == (4, True, False)
    assert not trajectory.rows[:, :, -2:].any()
    assert PNDM().trajectory(50).slots == 6


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("count", [9, 97, 1000])
def test_timesteps_of_every_number_of_steps(count: int, spacing: str, skip: bool) -> None:
    config = {"num_train_timesteps": count, "timestep_spacing": spacing, "skip_prk_steps": skip}
    scheduler, pndm = PNDMScheduler(**config), PNDM.from_config(config)
    for steps in range(1 if skip else 4, min(count, 200) + 5):
        scheduler.set_timesteps(steps)
        assert pndm.timesteps(steps).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skip", [True, False])
def test_predict_x0_inverts_the_noising(prediction: str, skip: bool) -> None:
    pndm = PNDM.from_config(STABLE_DIFFUSION | {"prediction_type": prediction, "skip_prk_steps": skip})
    trajectory, (x0, noise) = pndm.trajectory(20), (TorchGenerator(seed).randn((1, 4, 8)) for seed in (0, 1))
    for i, alpha in enumerate(pndm.alphas_cumprod[trajectory.timesteps]):
        sqrt_alpha, sqrt_beta = np.sqrt(alpha), np.sqrt(1 - alpha)
        out = noise if prediction == "epsilon" else sqrt_alpha * noise - sqrt_beta * x0
        np.testing.assert_allclose(
            trajectory.predict_x0(sqrt_alpha * x0 + sqrt_beta * noise, out, i), x0, rtol=0, atol=2e-5
        )


@settings(max_examples=150)
@given(
    options=st.fixed_dictionaries(
        {
            "num_train_timesteps": st.integers(1, 60),
            "steps_offset": st.integers(0, 3),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
            "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
            "skip_prk_steps": st.booleans(),
            "set_alpha_to_one": st.booleans(),
        }
    ),
    steps=st.integers(1, 70),
)
def test_refuses_exactly_what_diffusers_cannot_do(options: dict[str, Any], steps: int) -> None:
    config = {**options, "steps_offset": min(options["steps_offset"], options["num_train_timesteps"] - 1)}
    x = torch.from_numpy(TorchGenerator(0).randn((1, 1, 16)))
    try:
        scheduler, state, size = theirs(NAME, config, steps), x, 1.0
        for t in scheduler.timesteps.tolist():
            state = scheduler.step(0.1 * state, t, state).prev_sample
            size = max(size, float(state.abs().max()))
    except (ValueError, IndexError):
        with pytest.raises(SpecError, match=r"^steps"):
            PNDM.from_config(config).trajectory(steps)
        return
    if torch.isfinite(state).all():
        trajectory = PNDM.from_config(config).trajectory(steps)
        ours = trajectory.start(x.numpy())
        for i in range(len(trajectory)):
            ours = trajectory.step(ours, np.float32(0.1) * ours[0], i)
        np.testing.assert_allclose(ours[0], state.numpy(), rtol=0, atol=2e-3 * size)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_config_there_and_back(options: dict[str, Any]) -> None:
    pndm = PNDM.from_config(LATENT_DIFFUSION | options)
    text = json.dumps(pndm.to_config(), allow_nan=False)
    assert PNDM.from_config(json.loads(text)) == pndm
    back = PNDMScheduler.from_config({k: v for k, v in json.loads(text).items() if k != "class"})
    assert {name: back.config[name] for name in pndm.to_config() if name != "class"} | {"class": NAME} == (
        pndm.to_config()
    )


def test_the_defaults_are_those_of_diffusers() -> None:
    expected = {name: value for name, value in PNDMScheduler().config.items() if not name.startswith("_")}
    assert PNDM().to_config() == {"class": NAME, **expected}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skip_prk_steps", "yes"),
        ("skip_prk_steps", 2),
        ("set_alpha_to_one", []),
        ("prediction_type", "sample"),
        ("prediction_type", np.ones(3)),
        ("timestep_spacing", "karras"),
        ("steps_offset", -1),
        ("steps_offset", True),
        ("num_train_timesteps", 0),
        ("beta_start", np.bool_(True)),
        ("trained_betas", [0.1]),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("use_karras_sigmas", True),
        ("variance_type", "learned"),
        ("sigma_max", 10**5000),
        ("unknown", 1),
    ],
    ids=lambda v: repr(v)[:20] if not isinstance(v, int) else "number",
)
def test_values_refused(name: str, value: object) -> None:
    with pytest.raises(
        SpecError, match=rf"^scheduler: .*{name}.*, expected |{name}.*which PNDMScheduler lacks"
    ) as caught:
        PNDM.from_config(STABLE_DIFFUSION | {name: value})
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize("name", FOREIGN)
def test_options_of_other_schedulers(name: str) -> None:
    for value in FOREIGN[name] or (None, True, "pt"):
        assert PNDM.from_config(STABLE_DIFFUSION | {name: value}) == PNDM.from_config(STABLE_DIFFUSION)


def test_steps_refused() -> None:
    for steps in (0, -1, 10_001, 50.0, "50", True, np.bool_(True), None, 10**5000):
        with pytest.raises(SpecError, match=r"^steps: got .*, expected 1\.\.10000"):
            PNDM().trajectory(steps)  # type: ignore[arg-type]
    for steps in (1, 2, 3):
        with pytest.raises(SpecError, match=rf"^steps: got {steps}, expected at least 4, which skip_prk_steps"):
            PNDM().trajectory(steps)
    with pytest.raises(SpecError, match=r"^steps_offset: got 1 with 1000 steps: timestep 1000"):
        PNDM(steps_offset=1).trajectory(1000)
    assert len(PNDM().trajectory(np.int32(50))) == 59  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"^scheduler: timestep \d+: alpha_cumprod is 0 or 1"):
        PNDM(beta_start=1e-12, beta_end=1e-12).trajectory(10)
