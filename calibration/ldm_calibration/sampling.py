"""Selects the feeds that are observed, and those on which scalings are compared.

The observed steps are spread over all timesteps, and are denser where ranges change.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.trajectories import Feed, Trajectories

__all__ = ["chosen_steps", "feeds_of", "split_feeds"]

EVEN = 0.5
"""Share of the samples with even distances; the distribution of the other samples follows the change of ranges."""
STRIDE = 4
"""Without held-out requests, every ``STRIDE``-th feed is used to compare scalings."""


def chosen_steps(largest: NDArray[np.float32], count: int) -> list[int]:
    """Select at most ``count`` step indices in ascending order, including the first and the last step.

    Half of the density is even. The other half is proportional to the change of ranges since the previous step: the
    mean over all tensors of |log(range / previous range)|.

    Args:
        largest: Largest magnitude of each tensor at each step, float32 [steps, tensors].
        count: At least 2.
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


def feeds_of(recorded: Trajectories, component: str, count: int) -> list[Feed]:
    """Return the feeds of a component that are observed.

    The denoiser, which is the first component of the trajectories, is observed at ``count`` steps of each batch; every
    other component is observed with all its feeds.
    """
    feeds, steps = recorded.feeds[component], len(recorded.timesteps)
    if component != next(iter(recorded.feeds)):
        return list(feeds)
    chosen = chosen_steps(recorded.largest, count)
    return [feeds[start + step] for start in range(0, len(feeds), steps) for step in chosen]


def split_feeds(recorded: Trajectories, component: str, count: int) -> tuple[list[Feed], list[Feed]]:
    """``feeds_of`` in two parts: the feeds on which ranges are observed, and those on which scalings are compared.

    The second part belongs to the held-out requests. Without any, it is every ``STRIDE``-th feed of the first part.
    """
    feeds = feeds_of(recorded, component, count)
    held_out = recorded.held_out[component] * len(feeds) // len(recorded.feeds[component])
    if not held_out:
        return feeds, feeds[::STRIDE]
    return feeds[:-held_out], feeds[-held_out:]
