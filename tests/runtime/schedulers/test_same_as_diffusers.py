"""The oracle is diffusers: trajectories of every option, of options combined at random, and what it cannot do."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator
from ldm_runtime.plan import Plan
from ldm_runtime.request import Request
from ldm_runtime.schedulers import SCHEDULERS, Trajectory, scheduler_from_config
from tests.runtime.schedulers.scheduler_cases import CASES, RESAMPLED
from tests.runtime.schedulers.scheduler_oracle import (
    LATENT_DIFFUSION,
    assert_same_timesteps,
    assert_same_trajectory,
    diffusers_class,
    theirs,
    without_scipy,
)

OPTIONS = [(name, options) for name, case in CASES.items() for options in case.options]


def option_names(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={str(of)[:9]}" for name, of in value.items()) or "as is"
    return str(value).removesuffix("Scheduler")


@pytest.fixture(autouse=True, scope="module")
def _scipy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_scipy(monkeypatch)
        yield


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=option_names)
def test_every_option(name: str, options: dict[str, Any]) -> None:
    case = CASES[name]
    # Zero SNR begins with sigma 4096, by which diffusers multiplies float32 numbers that cancel.
    tolerance = 1e-3 if options.get("rescale_betas_zero_snr") and case.most != "original_inference_steps" else 0
    for eta in case.etas:
        for steps in (1, 3, 16):
            assert_same_trajectory(
                name, LATENT_DIFFUSION | options, steps, eta, forced=True, tolerance=max(tolerance, case.tolerance)
            )


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", CASES)
def test_calls_that_follow_one_another(name: str, steps: int) -> None:
    case = CASES[name]
    for prediction in ("epsilon", "v_prediction"):
        config = LATENT_DIFFUSION | {"prediction_type": prediction, "clip_sample": False}
        assert_same_trajectory(name, config, steps, case.etas[-1], tolerance=case.drift)


@pytest.mark.parametrize("name", CASES)
def test_runs_that_start_from_an_image(name: str) -> None:
    """The calls that a strength leaves, and the noise that is added to the image before each of them."""
    case = CASES[name]
    options = [{}, {"solver_order": 3}] if name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler") else [{}]
    for option in options:
        config = LATENT_DIFFUSION | {"clip_sample": False, "skip_prk_steps": True, "steps_offset": 1} | option
        for skipped in (1, 2, 5, 11):
            assert_same_trajectory(name, config, 12, case.etas[-1], tolerance=case.drift, skipped=skipped)


def test_runge_kutta_steps_cannot_be_left_out() -> None:
    scheduler = scheduler_from_config({"class": "PNDMScheduler"})
    with pytest.raises(SpecError, match="skip_prk_steps false cannot start from an image"):
        scheduler.trajectory_after(1, 12)


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler", "sde-dpmsolver++"]
)
def test_a_generator_for_each_image(name: str) -> None:
    """diffusers draws the noise of each image from its own generator, at every step."""
    config: dict[str, Any] = LATENT_DIFFUSION | {"clip_sample": False}
    if name == "sde-dpmsolver++":
        name, config = "DPMSolverMultistepScheduler", LATENT_DIFFUSION | {"algorithm_type": name}
    scheduler, trajectory = theirs(name, config, 6), scheduler_from_config({"class": name, **config}).trajectory(6, 0.5)
    plan = Plan(Request(), (4, 5), (2, 4, 6, 8), None, 1.0, ("conditional",), (), trajectory)
    generators, noise = [torch.Generator().manual_seed(seed) for seed in plan.seeds], plan.noise()
    state = plan.start(noise)
    x = randn_tensor(plan.shape, generator=generators) * scheduler.init_noise_sigma
    options = {"eta": 0.5} if "eta" in inspect.signature(scheduler.step).parameters else {}
    for i, timestep in enumerate(scheduler.timesteps.tolist()):
        scheduler.scale_model_input(x, timestep)
        x = scheduler.step(0.1 * x, timestep, x, generator=generators, **options).prev_sample
        state = trajectory.step(state, np.float32(0.1) * state[0], i, next(noise) if trajectory.needs_noise else None)
        np.testing.assert_allclose(state[0], x.numpy(), rtol=0, atol=3e-5 * max(1, float(x.abs().max())))


@pytest.mark.parametrize("name", CASES)
def test_the_defaults_are_those_of_diffusers(name: str) -> None:
    scheduler, expected = SCHEDULERS[name](), dict(diffusers_class(name)().config)
    assert {option: expected.get(option) for option in scheduler.to_config() if option != "class"} | {
        "class": name
    } == scheduler.to_config()
    assert SCHEDULERS[name].from_config(expected) == scheduler


@pytest.mark.parametrize("name", CASES)
def test_state(name: str) -> None:
    trajectory = scheduler_from_config({"class": name, "clip_sample": False}).trajectory(20, 0.5)
    assert (trajectory.slots, trajectory.affine) == (CASES[name].slots, True)
    assert not trajectory.rows[:, :, -2].any()
    with pytest.raises(SpecError, match=r"^steps: got 0, expected 1\.\.1000"):
        scheduler_from_config({"class": name}).trajectory(0)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_runs_what_diffusers_runs(name: str, data: st.DataObject) -> None:
    config = data.draw(st.fixed_dictionaries(CASES[name].combined))
    if spacing := config.pop("spacing", ""):
        config[spacing] = True
    config["num_train_timesteps"] = data.draw(st.integers(2, 80))
    most = min(config["num_train_timesteps"], config.get(CASES[name].most, 80))
    steps, eta = data.draw(st.integers(1, most)), data.draw(st.sampled_from(CASES[name].etas))
    if "steps_offset" in config:  # not beyond the training timesteps
        last = (steps - 1) * (config["num_train_timesteps"] // steps)
        config["steps_offset"] = min(config["steps_offset"], config["num_train_timesteps"] - 1 - last)
    try:
        ours: Trajectory | None = scheduler_from_config({"class": name, **config}).trajectory(steps, eta)
    except SpecError:
        ours = None
    expected = _moved(name, config, steps, eta)
    if expected is None or ours is None:
        last_bit = config.get("rescale_betas_zero_snr")  # of an alpha decides whether diffusers divides by zero
        assert ours is None or last_bit, "diffusers gives no image"
        assert expected is None or _narrower(expected[0]), "diffusers gives an image"
        return
    scheduler, x, results = expected
    inexact = config.get("rescale_betas_zero_snr") or any(config.get(option) for option in RESAMPLED)
    if ours.timesteps.dtype == np.int64 and inexact:  # the last bit of a sigma decides
        assert np.abs(ours.timesteps - scheduler.timesteps.numpy()).max() <= 1
    elif config.get("rescale_betas_zero_snr"):  # the last bit of the first alpha is a thousandth of the least sigma
        np.testing.assert_allclose(ours.timesteps, scheduler.timesteps.numpy(), rtol=1e-3, atol=1e-3)
    else:
        # The last bits of alphas depend on the vector width of torch's linspace, that is, on the CPU. Timesteps of
        # resampled sigmas are interpolated between their logarithms: one bit moves them by about 6e-8 / beta_start.
        assert_same_timesteps(ours, scheduler, atol=1e-3 if inexact else 1e-4)
    gaps = np.abs(np.diff(np.log(np.maximum(getattr(scheduler, "sigmas", torch.tensor([1e9, 1])).numpy(), 1e-12))))
    if ours.slots > 2 and gaps.min() < 1e-3:  # diffusers divides by a difference of float32 logarithms
        return
    state = ours.start(x.numpy())
    for i, (start, result) in enumerate(results):
        state[0] = start.numpy()
        state = ours.step(state, 0.1 * state[0], i, x.numpy() if ours.needs_noise else None)
        size = max(1.0, float(result.abs().max()), float(start.abs().max()))
        tolerance = 2e-2 if config.get("rescale_betas_zero_snr") else 1e-3
        np.testing.assert_allclose(state[0], result.numpy(), rtol=0, atol=tolerance * size, err_msg=str(i))


def _moved(name: str, config: dict[str, Any], steps: int, eta: float) -> Any:
    """The scheduler, its first x, and x before and after each call; None if diffusers fails or gives no finite x."""
    x = torch.from_numpy(TorchGenerator(0).randn((1, 1, 16)))
    results = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        module = inspect.getmodule(diffusers_class(name))
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: x)
        try:
            scheduler = theirs(name, config, steps)
            now = x
            for t in scheduler.timesteps.tolist():
                options = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
                scheduler.scale_model_input(now, t)
                before, now = now, scheduler.step(0.1 * now, t, now, **options).prev_sample
                results.append((before, now))
        except (ValueError, IndexError, NotImplementedError, RuntimeError):
            return None
    return (scheduler, x, results) if torch.isfinite(torch.stack([after for _, after in results])).all() else None


def _narrower(scheduler: Any) -> bool:
    """True if ours refuses what diffusers' scheduler computes.

    These are a first timestep that occurs twice, so that a pipeline begins with the second and has no sigma for the
    last, and an infinite x0 that is clipped.
    """
    timesteps, config = scheduler.timesteps, scheduler.config
    twice = int((timesteps == timesteps[0]).sum()) > 1
    infinite = scheduler.alphas_cumprod[-1] == 0 and config.prediction_type == "epsilon"
    return twice or bool(infinite and (config.get("clip_sample") or config.get("thresholding")))
