"""The noise schedule of a CompVis model as options of diffusers' DDIMScheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm_export.checkpoint.weights import StoredTensor
from ldm_runtime.errors import CheckpointError
from ldm_runtime.schedulers.noise_schedule import COMPVIS_SPACING

__all__ = ["betas_of", "scheduler_options"]

_PUBLISHED_BETAS = (0.00085, 0.0015, 0.012, 0.0155, 0.0195, 0.0205)
_TOLERANCES = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}


def betas_of(
    tensors: Mapping[str, StoredTensor], linear: tuple[float, float] | None
) -> tuple[int, float, float] | None:
    """Training timesteps, linear_start and linear_end from the buffer ``betas``; None if there is no such buffer.

    The schedule is recomputed in float32 from these numbers. The buffer of a half-precision file is rounded; its
    numbers are replaced by the nearest published ones. The authors' sampler would use the rounded buffer, which changes
    latents by 1e-3 to 1e-2.

    Args:
        tensors: The state dict.
        linear: linear_start and linear_end in the yaml, to be compared.

    Raises:
        CheckpointError: The buffer is not a "linear" schedule of CompVis, or not that of the yaml.
    """
    stored = tensors.get("betas")
    if stored is None or len(stored.shape) != 1 or not 2 <= stored.shape[0] <= 100_000:
        return None
    values, tolerance = stored.read().double(), _TOLERANCES.get(stored.dtype, 2e-6)
    start, end = linear or (_snapped(float(values[0]), tolerance), _snapped(float(values[-1]), tolerance))
    expected = torch.linspace(start**0.5, end**0.5, len(values), dtype=torch.float64) ** 2
    if not torch.allclose(values, expected, rtol=2 * tolerance, atol=1e-7):
        got = f"{float(values[0]):.6g} to {float(values[-1]):.6g}"
        raise CheckpointError(
            f"{stored.file}: tensor betas: got {got}, expected the square of a line from {start:g} to {end:g} "
            "(schedule 'linear'); give the checkpoint's own yaml, other schedules are not supported"
        )
    return len(values), start, end


def _snapped(value: float, tolerance: float) -> float:
    near = [beta for beta in _PUBLISHED_BETAS if abs(beta - value) <= tolerance * beta]
    return near[0] if near else float(f"{value:.6g}")


def scheduler_options(timesteps: int, start: float, end: float) -> dict[str, Any]:
    """Options of DDIM that correspond to CompVis' DDIMSampler; the last step ends at the first training timestep.

    Its timesteps are ``range(0, 1000, 1000 // steps) + 1``: 31 of them for 30 steps.
    """
    return {
        "num_train_timesteps": timesteps,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": COMPVIS_SPACING,
    }
