"""Trajectories of scaled latents, for the device loop: its latents are the UNet's input, x times the input scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.schedulers.trajectory import Trajectory

__all__ = ["scale_after", "scaled", "scaled_rows"]

F32 = NDArray[np.float32]


def scale_after(trajectory: Trajectory, calls: int) -> np.float32:
    """Return the factor of the latents on a device after ``calls`` calls: the input scale of the next call, or 1."""
    return np.float32(trajectory.input_scale[calls]) if calls < len(trajectory) else np.float32(1)


def scaled(latents: F32, scale: np.float32) -> F32:
    """Multiply latents by a factor; by 1 they stay the same array."""
    return latents if scale == 1 else latents * scale


def scaled_rows(trajectory: Trajectory) -> F32:
    """Coefficients of a trajectory whose slot 0 is x times the input scale of the next call; after the last call, x.

    With these, the result of a step is the next input of the UNet, so a loop needs no operation for scaling.

    Returns:
        float32 [calls, slots, slots + 3] like ``Trajectory.rows``, and equal to them if the input is not scaled.
    """
    before = trajectory.input_scale.astype(np.float64)
    if (before == 1).all():
        return trajectory.rows
    rows = trajectory.rows.astype(np.float64)
    rows[:, 0] *= np.append(before[1:], 1.0)[:, None]
    rows[:, :, 0] /= before[:, None]
    return rows.astype(np.float32)
