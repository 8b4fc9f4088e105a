"""Runs a scheduler of diffusers and ours side by side, each with its own noise of one seed."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import torch

from ldm_runtime.noise import TorchGenerator
from ldm_runtime.schedulers import scheduler_from_config

SHAPE = (2, 4, 6, 8)
LATENT_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAINED = np.linspace(0.001, 0.03, 1000).tolist()


def theirs(name: str, config: dict[str, Any], steps: int) -> Any:
    """A scheduler of diffusers with its timesteps set."""
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):  # without it, equal first timesteps make it begin with the second
        scheduler.set_begin_index(0)
    return scheduler


def model(x: np.ndarray, timestep: int) -> np.ndarray:
    """A smooth stand-in for a UNet: any function of x and t serves."""
    return (0.8 * np.sin(1.3 * x + 0.01 * timestep) + 0.1 * x).astype(np.float32)


def assert_same_trajectory(
    name: str, config: dict[str, Any], steps: int, eta: float = 0.0, forced: bool = False, tolerance: float = 1e-5
) -> None:
    """Compare x after every call, relative to the largest magnitude of x or, if larger, 1.

    A last step of length zero must keep x where diffusers gives NaN.

    forced: Before every call, ours takes the x of diffusers; its history remains its own.
    """
    scheduler = theirs(name, config, steps)
    trajectory = scheduler_from_config({"class": name, **config}).trajectory(steps, eta)
    assert trajectory.timesteps.tolist() == scheduler.timesteps.tolist()
    assert trajectory.init_noise_sigma == scheduler.init_noise_sigma
    torch_generator, generator = torch.Generator().manual_seed(3), TorchGenerator(3)
    accepted = inspect.signature(scheduler.step).parameters
    options = {k: v for k, v in {"eta": eta, "generator": torch_generator}.items() if k in accepted}
    x, state = torch.randn(SHAPE, generator=torch_generator), trajectory.start(generator.randn(SHAPE))
    assert len(state) == trajectory.slots
    for i, timestep in enumerate(scheduler.timesteps.tolist()):
        if forced:
            state[0] = x.numpy()
        x_in = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(torch.from_numpy(model(x_in.numpy(), timestep)), timestep, x, **options).prev_sample
        prediction = model(state[0] * trajectory.input_scale[i], timestep)
        state = trajectory.step(state, prediction, i, generator.randn(SHAPE) if trajectory.needs_noise else None)
        assert {array.dtype for array in state} == {np.dtype(np.float32)}
        if i == len(trajectory) - 1 and x.isnan().all():
            np.testing.assert_allclose(state[0], x_in.numpy(), rtol=0, atol=tolerance)
            return
        size = max(1.0, float(x.abs().max()))
        where = f"call {i} of {len(trajectory)}, {steps} steps, eta {eta}"
        np.testing.assert_allclose(state[0], x.numpy(), rtol=0, atol=tolerance * size, err_msg=where)
    np.testing.assert_allclose(generator.randn((16,)), torch.randn(16, generator=torch_generator), rtol=0, atol=3e-6)
