"""Runs a scheduler of diffusers and ours side by side, each with its own noise of one seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lms_discrete

from ldm_runtime.noise import TorchGenerator
from ldm_runtime.schedulers import SCHEDULERS, Trajectory, scheduler_from_config
from ldm_runtime.schedulers.sigmas import beta_quantile
from ldm_runtime.start import Kept

SHAPE = (2, 4, 6, 8)
LATENT_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAINED = np.linspace(0.001, 0.03, 1000).tolist()


def diffusers_class(name: str) -> Any:
    """A scheduler class of diffusers, which does not export all of them without SciPy."""
    return getattr(scheduling_lms_discrete if name == "LMSDiscreteScheduler" else diffusers, name)


def without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the two functions of SciPy that diffusers' schedulers call, since SciPy is not installed."""

    def quad(function: Callable[[float], Any], low: Any, high: Any, epsrel: float) -> tuple[float]:
        nodes, weights = np.polynomial.legendre.leggauss(8)
        middle, half = (float(low) + float(high)) / 2, (float(high) - float(low)) / 2
        return (sum(w * float(function(middle + half * x)) for x, w in zip(nodes, weights, strict=True)) * half,)

    probabilities = np.concatenate([1 - np.linspace(0, 1, steps) for steps in (*range(1, 101), 177, 1000)])
    quantiles = dict(zip(probabilities.tolist(), beta_quantile(probabilities).tolist(), strict=True))

    def ppf(p: float, a: float, b: float) -> float:
        assert (a, b) == (0.6, 0.6)
        return quantiles[float(p)]

    integrate, stats = SimpleNamespace(quad=quad), SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=ppf)))
    monkeypatch.setattr(scheduling_lms_discrete, "integrate", integrate, raising=False)
    for name in SCHEDULERS:
        module = inspect.getmodule(diffusers_class(name))
        monkeypatch.setattr(module, "scipy", stats, raising=False)
        monkeypatch.setattr(module, "is_scipy_available", lambda: True, raising=False)


def theirs(name: str, config: dict[str, Any], steps: int) -> Any:
    """A scheduler of diffusers with its timesteps set."""
    scheduler = diffusers_class(name).from_config(config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # without it, equal first timesteps make it begin with the second
        scheduler.set_begin_index(0)
    return scheduler


def model(x: np.ndarray, timestep: float) -> np.ndarray:
    """A smooth stand-in for a UNet: any function of x and t serves."""
    return (0.8 * np.sin(1.3 * x + 0.01 * timestep) + 0.1 * x).astype(np.float32)


def assert_same_timesteps(
    trajectory: Trajectory, scheduler: Any, timesteps: torch.Tensor | None = None, atol: float = 1e-4
) -> None:
    """Compare timesteps, exactly where they are whole, and the scale of the initial noise."""
    expected = (scheduler.timesteps if timesteps is None else timesteps).numpy()
    if trajectory.timesteps.dtype == np.int64:
        assert trajectory.timesteps.tolist() == expected.tolist()
    else:
        assert (trajectory.timesteps.dtype, expected.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(trajectory.timesteps, expected, rtol=2e-6, atol=atol)
    assert trajectory.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)


def assert_same_trajectory(
    name: str,
    config: dict[str, Any],
    steps: int,
    eta: float = 0.0,
    forced: bool = False,
    tolerance: float = 1e-5,
    skipped: int = 0,
) -> None:
    """Compare x after every call, relative to the largest magnitude of x or, if larger, 1.

    A last step of length zero must keep x where diffusers gives NaN. Noise that diffusers does not draw at the end must
    have weight zero.

    forced: Before every call, ours takes the x of diffusers; its history remains its own.
    skipped: Steps that are left out; x is then an image with noise, and what a mask keeps is compared, too.
    """
    scheduler = theirs(name, config, steps)
    ours = scheduler_from_config({"class": name, **config})
    trajectory = ours.trajectory_after(skipped, steps, eta) if skipped else ours.trajectory(steps, eta)
    timesteps = scheduler.timesteps[skipped * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped * scheduler.order)
    assert_same_timesteps(trajectory, scheduler, timesteps)
    torch_generator, generator = torch.Generator().manual_seed(3), TorchGenerator(3)
    accepted = inspect.signature(scheduler.step).parameters
    options = {k: v for k, v in {"eta": eta, "generator": torch_generator}.items() if k in accepted}
    x = torch.randn(SHAPE, generator=torch_generator) * scheduler.init_noise_sigma
    state = trajectory.start(generator.randn(SHAPE) * np.float32(trajectory.init_noise_sigma))
    image = torch.linspace(-2, 2, x.numel()).reshape(SHAPE)
    kept = Kept(np.zeros((1,), np.float32), image.numpy(), state[0] / np.float32(trajectory.init_noise_sigma))
    noise = torch.from_numpy(kept.noise)
    if skipped:
        x = scheduler.add_noise(image, noise, timesteps[:1])
        state = trajectory.start(kept.blend(state[0], trajectory, 0))
        np.testing.assert_allclose(state[0], x.numpy(), rtol=1e-5, atol=1e-5)
    assert len(state) == trajectory.slots
    drawn = True
    for i, timestep in enumerate(timesteps.tolist()):
        if forced:
            state[0] = x.numpy()
        x_in, before = scheduler.scale_model_input(x, timestep), torch_generator.get_state()
        np.testing.assert_allclose(x.numpy() * trajectory.input_scale[i], x_in.numpy(), rtol=1e-6)
        x = scheduler.step(torch.from_numpy(model(x_in.numpy(), timestep)), timestep, x, **options).prev_sample
        draws = not torch.equal(before, torch_generator.get_state())
        assert draws <= min(drawn, trajectory.needs_noise), "noise that ours does not draw, or not in this order"
        assert draws or not trajectory.rows[i, :, -1].any()
        drawn = draws
        prediction = model(state[0] * trajectory.input_scale[i], timestep)
        state = trajectory.step(state, prediction, i, generator.randn(SHAPE) if trajectory.needs_noise else None)
        assert {array.dtype for array in state} == {np.dtype(np.float32)}
        if i == len(trajectory) - 1 and x.isnan().all():
            np.testing.assert_allclose(state[0], x_in.numpy(), rtol=0, atol=tolerance)
            return
        if skipped and i + 1 < len(trajectory):
            expected = scheduler.add_noise(image, noise, timesteps[i + 1 : i + 2]).numpy()
            np.testing.assert_allclose(kept.blend(state[0], trajectory, i + 1), expected, rtol=1e-5, atol=1e-5)
        size = max(1.0, float(x.abs().max()))
        where = f"call {i} of {len(trajectory)}, {steps} steps, eta {eta}"
        np.testing.assert_allclose(state[0], x.numpy(), rtol=0, atol=tolerance * size, err_msg=where)
    if drawn == trajectory.needs_noise:
        np.testing.assert_allclose(
            generator.randn((16,)), torch.randn(16, generator=torch_generator), rtol=0, atol=3e-6
        )
