"""The denoising loop in NumPy: guidance, feature caching, scheduler steps, and restoring an image outside its mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.denoiser import Denoiser, Tensors
from ldm_runtime.feature_cache import DeepFeatures
from ldm_runtime.guidance import StepBranches, guide, rescale
from ldm_runtime.plan import Plan
from ldm_runtime.start import Start

__all__ = ["host_steps"]

F32 = NDArray[np.float32]


def host_steps(plan: Plan, encoded: Tensors, denoiser: Denoiser, start: Start) -> Iterator[Callable[[], F32]]:
    """Run a plan one UNet call at a time, as ``DeviceLoop.steps``.

    Args:
        plan: The plan of a request.
        encoded: Outputs of the conditioners, [plan.rows, …].
        denoiser: The UNet and the components that derive its inputs.
        start: Initial latents and the noise of the steps.

    Yields:
        A function that returns the latents after the call, float32 [images, C, h, w].

    Raises:
        BackendError: The engine failed.
    """
    trajectory = plan.trajectory
    conditioning = denoiser.condition(encoded)
    schedule = denoiser.embed(trajectory.timesteps)
    conditional = {name: array[-plan.images :] for name, array in conditioning.items()}
    state = trajectory.start(start.latents)
    direction = np.zeros_like(state[0])
    features = DeepFeatures(denoiser, plan.rows)
    for index, branches in enumerate(plan.steps):
        scale = trajectory.input_scale[index]
        sample = state[0] if scale == 1 else state[0] * scale
        both = branches is StepBranches.BOTH
        rows = np.concatenate([sample, sample]) if both else sample
        embedded = {name: np.repeat(array[index : index + 1], len(rows), 0) for name, array in schedule.items()}
        predicted = features.predict(
            rows,
            embedded,
            conditioning if both else conditional,
            slice(plan.rows - len(rows), plan.rows),
            shallow=plan.shallow[index],
            keep=plan.caches,
        )
        asked = predicted[-plan.images :]
        if both:
            predicted, direction = guide(predicted[: plan.images], asked, np.float32(plan.guidance_scale))
        elif branches is StepBranches.REUSED:
            predicted = predicted + np.float32(plan.guidance_scale - 1) * direction
        if plan.guidance_rescale and branches is not StepBranches.CONDITIONAL:
            predicted = rescale(predicted, asked, np.float32(plan.guidance_rescale))
        state = trajectory.step(state, predicted, index, next(start.noise) if trajectory.needs_noise else None)
        if start.kept is not None:
            state[0] = start.kept.blend(state[0], trajectory, index + 1)
        yield partial(_same, state[0])


def _same(latents: F32) -> F32:
    return latents
