"""The oracle is diffusers' DPMSolverMultistepScheduler: timesteps, sigmas, trajectories and what it cannot do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime.noise import TorchGenerator
from ldm_runtime.schedulers import DPMSolverMultistep
from ldm_runtime.schedulers.sigmas import beta_quantile
from tests.runtime.schedulers.scheduler_oracle import LATENT_DIFFUSION, TRAINED, assert_same_trajectory, theirs

NAME = "DPMSolverMultistepScheduler"
SCIPY = [0.03958440558878085, 0.23401700387523572]  # scipy.stats.beta.ppf([0.1, 0.3], 0.6, 0.6)
ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
LOWER_ORDER = (14, 15)
"""The largest number of steps whose last ones are of lower order, and the smallest whose last ones are not."""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"final_sigmas_type": "sigma_min"},
    {"lower_order_final": False},
    {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9},
    {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    {"use_exponential_sigmas": True},
    {"use_exponential_sigmas": True, "sigma_min": 0.05},
    {"use_lu_lambdas": True},
    {"use_lu_lambdas": True, "use_karras_sigmas": True},
    {"timestep_spacing": "leading"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
    {"timestep_spacing": "trailing", "lambda_min_clipped": -1.0},
    {"lambda_min_clipped": -2.0},
    {"beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    {"trained_betas": TRAINED},
    {"num_train_timesteps": 177},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 4.0, "dynamic_thresholding_ratio": 0.3},
    {"algorithm_type": "deis", "solver_type": "logrho"},
]


def option_names(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={str(value)[:9]}" for name, value in options.items()) or "-"


def config_of(algorithm: str, options: dict[str, Any]) -> dict[str, Any]:
    """A config that diffusers accepts: the noise-predicting algorithms have no final sigma of zero."""
    config = LATENT_DIFFUSION | {"algorithm_type": algorithm} | options
    if not config["algorithm_type"].endswith("++") and config["algorithm_type"] != "deis":
        config["final_sigmas_type"] = "sigma_min"
    if config["algorithm_type"] == "deis":
        config.setdefault("final_sigmas_type", "sigma_min")
    return config


@pytest.mark.parametrize("options", OPTIONS, ids=option_names)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_every_option(algorithm: str, order: int, options: dict[str, Any]) -> None:
    config = config_of(algorithm, {"solver_order": order} | options)
    # The third order divides a difference of nearly equal float32 numbers by h², which diffusers does not compute well.
    # Zero SNR begins with sigma 4096, by which diffusers multiplies float32 numbers that cancel.
    tolerance = 1e-2 if config.get("rescale_betas_zero_snr") else 1e-4 if order == 3 else 2e-5
    for steps in (1, 2, *LOWER_ORDER):
        assert_same_trajectory(NAME, config, steps, forced=True, tolerance=tolerance)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("thresholding", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trajectories(algorithm: str, thresholding: bool, order: int, solver_type: str, prediction: str) -> None:
    if algorithm == "sde-dpmsolver" and order == 3:
        return
    config = {"solver_order": order, "solver_type": solver_type, "prediction_type": prediction}
    config = config_of(algorithm, config | {"thresholding": thresholding, "sample_max_value": 1.5})
    for steps in (1, *LOWER_ORDER):
        assert_same_trajectory(NAME, config, steps, eta=0.4, forced=True, tolerance=1e-4 if order == 3 else 2e-5)


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
@pytest.mark.parametrize(
    "options", [{}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"}], ids=option_names
)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_trajectories_on_their_own(algorithm: str, options: dict[str, Any], steps: int) -> None:
    assert_same_trajectory(NAME, config_of(algorithm, options), steps, tolerance=1e-4)


def test_all_trailing_steps() -> None:
    """61 steps end at timestep -1."""
    trajectory = DPMSolverMultistep(timestep_spacing="trailing").trajectory(61)
    assert (len(trajectory), trajectory.timesteps[-1]) == (62, -1)
    assert_same_trajectory(NAME, config_of("dpmsolver++", {"timestep_spacing": "trailing"}), 61, forced=True)


@pytest.mark.parametrize("options", [o for o in OPTIONS if not o.get("thresholding")], ids=option_names)
def test_timesteps_of_many_numbers_of_steps(options: dict[str, Any]) -> None:
    config = config_of("dpmsolver++", options)
    ours, scheduler = DPMSolverMultistep.from_config(config), DPMSolverMultistepScheduler.from_config(config)
    for steps in [*range(1, 60), 100, 103, 121, 999, 1000, 1100]:
        scheduler.set_timesteps(steps)
        timesteps, sigmas = ours._timesteps_and_sigmas(steps)
        assert timesteps.tolist() == scheduler.timesteps.tolist()
        np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=2e-5)


def test_beta_sigmas() -> None:
    """The density is integrated with the substitution t = s^(5/3), which removes its singularity at 0."""
    p = np.linspace(0, 1, 41)
    x = beta_quantile(p)
    np.testing.assert_allclose(x + x[::-1], 1, rtol=0, atol=1e-15)
    s = np.linspace(0, 0.5**0.6, 200_001)
    density = (1 - s ** (1 / 0.6)) ** -0.4
    integral = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(s))])
    result = np.interp(x[:21] ** 0.6, s, integral / integral[-1] / 2)
    np.testing.assert_allclose(result, p[:21], rtol=0, atol=1e-9)
    np.testing.assert_allclose(beta_quantile(np.array([0.1, 0.3])), SCIPY, rtol=1e-12)
    ours = DPMSolverMultistep.from_config(LATENT_DIFFUSION | {"use_beta_sigmas": True})
    sigmas = ours._timesteps_and_sigmas(20)[1]
    assert (np.diff(sigmas) < 0).all()
    assert np.isfinite(ours.trajectory(20).rows).all()


def test_state() -> None:
    for order in (1, 2, 3):
        trajectory = DPMSolverMultistep(solver_order=order).trajectory(20, eta=1.0)
        assert (trajectory.slots, trajectory.affine, trajectory.needs_noise) == (order, True, False)
        assert not trajectory.rows[:, :, -2:].any()
    assert DPMSolverMultistep(algorithm_type="sde-dpmsolver++").trajectory(20).needs_noise
    assert not DPMSolverMultistep(thresholding=True).trajectory(20).affine


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_predict_x0_inverts_the_noising(prediction: str) -> None:
    scheduler = DPMSolverMultistep.from_config(LATENT_DIFFUSION | {"prediction_type": prediction})
    trajectory, (x0, noise) = scheduler.trajectory(20), (TorchGenerator(seed).randn((1, 4, 8)) for seed in (0, 1))
    for i, alpha in enumerate(scheduler.alphas_cumprod[trajectory.timesteps]):
        sqrt_alpha, sqrt_beta = np.sqrt(alpha), np.sqrt(1 - alpha)
        out = {"epsilon": noise, "sample": x0, "v_prediction": sqrt_alpha * noise - sqrt_beta * x0}[prediction]
        np.testing.assert_allclose(
            trajectory.predict_x0(sqrt_alpha * x0 + sqrt_beta * noise, out, i), x0, rtol=0, atol=2e-5
        )


def test_a_step_of_length_zero_keeps_x_where_diffusers_gives_nan() -> None:
    config = config_of("dpmsolver++", {"solver_type": "heun", "timestep_spacing": "trailing"})
    config |= {"final_sigmas_type": "sigma_min", "num_train_timesteps": 50}
    trajectory = DPMSolverMultistep.from_config(config).trajectory(50)
    np.testing.assert_array_equal(trajectory.rows[-1, 0], [1, 0, 0, 0, 0])


@settings(max_examples=150)
@given(
    count=st.integers(2, 80),
    steps=st.integers(1, 60),
    order=st.integers(1, 3),
    options=st.fixed_dictionaries(
        {
            "steps_offset": st.integers(0, 1),
            "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
            "timestep_spacing": st.sampled_from(["leading", "linspace", "trailing"]),
            "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
            "algorithm_type": st.sampled_from(["dpmsolver++", "dpmsolver", "sde-dpmsolver++"]),
            "solver_type": st.sampled_from(["midpoint", "heun"]),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
            "lower_order_final": st.booleans(),
            "euler_at_final": st.booleans(),
            "rescale_betas_zero_snr": st.booleans(),
            "use_karras_sigmas": st.booleans(),
            "use_lu_lambdas": st.booleans(),
        }
    ),
)
def test_runs_what_diffusers_runs(count: int, steps: int, order: int, options: dict[str, Any]) -> None:
    config = config_of(options["algorithm_type"], options | {"num_train_timesteps": count, "solver_order": order})
    x = torch.from_numpy(TorchGenerator(0).randn((1, 1, 16)))
    scheduler = theirs(NAME, config, steps)
    values, now = [], x
    for t in scheduler.timesteps:
        now = scheduler.step(0.1 * now, t, now, variance_noise=x).prev_sample
        values.append(now)
    if not torch.isfinite(torch.stack(values)).all():
        return
    trajectory = DPMSolverMultistep.from_config(config).trajectory(steps)
    # torch does not round square roots correctly, so a sigma can lie on the other side of a timestep's.
    inexact = options["use_karras_sigmas"] or options["use_lu_lambdas"]
    assert np.abs(trajectory.timesteps - scheduler.timesteps.numpy()).max() <= inexact
    sigmas = scheduler.sigmas.numpy()
    gaps = np.abs(np.diff(np.log(np.maximum(sigmas, 1e-12))))
    if gaps.min() < 1e-3:  # diffusers divides by a difference of float32 logarithms, here all rounding
        return
    state = trajectory.start(x.numpy())
    for i, expected in enumerate(values):
        state = trajectory.step(state, 0.1 * state[0], i, x.numpy() if trajectory.needs_noise else None)
        size = max(1.0, float(torch.stack(values).abs().max()))
        tolerance = 2e-2 if config["rescale_betas_zero_snr"] else 2e-3  # float32 numbers times 4096 that cancel
        np.testing.assert_allclose(state[0], expected.numpy(), rtol=0, atol=tolerance * size)
