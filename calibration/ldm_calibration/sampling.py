"""Which steps of the trajectories are samples: spread over all timesteps, denser where ranges move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.trajectories import Trajectories

EVEN = 0.5
"""Share of the samples that is spread evenly; the others follow the movement of the ranges."""


def chosen_steps(largest: NDArray[np.float32], count: int) -> list[int]:
    """``count`` step indices at most, rising, the first and the last among them.

    Args:
        largest: of each tensor at each step, float32 [steps, tensors].
        count: at least 2.

    The density at a step is half even and half in proportion to how far the ranges moved since the step before: the
    mean over the tensors of |log(range / range before)|.
    """
    steps = len(largest)
    if count >= steps:
        return list(range(steps))
    logs = np.log(np.maximum(largest.astype(np.float64), 1e-12))
    moved = np.abs(np.diff(logs, axis=0)).mean(1) if largest.shape[1] else np.zeros(steps - 1)
    even = np.full(steps - 1, 1 / (steps - 1))
    density = EVEN * even + (1 - EVEN) * (moved / moved.sum() if moved.sum() else even)
    reached = np.concatenate([[0.0], np.cumsum(density)])
    return sorted({int(np.argmin(np.abs(reached - place))) for place in np.linspace(0, 1, count)})


def unet_feeds(held: Trajectories, count: int) -> list[Mapping[str, NDArray[Any]]]:
    """The UNet's inputs at the chosen steps, all rows of each batch."""
    feeds = []
    for samples, context in zip(held.samples, held.contexts, strict=True):
        for step in chosen_steps(held.largest, count):
            sample = samples[step]
            timestep = np.full(len(sample), held.timesteps[step], np.int64)
            feeds.append({"sample": sample, "timestep": timestep, "context": context})
    return feeds


def feeds_of(held: Trajectories, component: str, count: int) -> list[Mapping[str, NDArray[Any]]]:
    """What a component is given along the trajectories: the UNet ``count`` steps of each, the others all there is."""
    if component == "unet":
        return unet_feeds(held, count)
    if component == "decoder":
        return [{"latents": latents} for latents in held.latents]
    return [{"input_ids": tokens} for tokens in held.tokens]
