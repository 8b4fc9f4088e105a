"""Classifier-free guidance: which branches each denoising step evaluates, and how predictions are combined."""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import integer, number, shown

__all__ = ["FULL_INTERVAL", "StepBranches", "guide", "rescale", "step_branches"]

F32 = NDArray[np.float32]
FULL_INTERVAL = (0.0, 1.0)
MAX_EVERY = 1000


class StepBranches(Enum):
    """Guidance branches that one denoising step evaluates.

    BOTH: The unconditional and the conditional branch, and from them the guidance direction.
    REUSED: The conditional branch only, with the guidance direction of the last step that evaluated both.
    CONDITIONAL: The conditional branch only, without guidance.
    """

    BOTH = "both"
    REUSED = "reused"
    CONDITIONAL = "conditional"


def step_branches(interval: tuple[float, float], every: int, steps: int) -> tuple[StepBranches, ...]:
    """Decide, for each denoising step, which branches of classifier-free guidance to evaluate.

    Args:
        interval: Start and end of guidance as shares of the steps, 0 <= start <= end <= 1; guidance is off outside
            (Kynkäänniemi et al. 2024, arXiv:2404.07724).
        every: Evaluate both branches every N-th guided step. The steps between evaluate only the conditional branch
            and reuse the last guidance direction, which changes slowly (compare Lv et al. 2024, arXiv:2410.19355).
        steps: Number of UNet calls.

    Raises:
        SpecError: ``interval`` is not two such numbers, or ``every`` is not a whole number from 1.
    """
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        raise SpecError(f"guidance_interval: got {shown(interval)}, expected two numbers from 0 to 1")
    start, end = (number("guidance_interval", share, 0.0, 1.0) for share in interval)
    if start > end:
        raise SpecError(f"guidance_interval: got {start:g} to {end:g}, expected 0 <= start <= end <= 1")
    every = integer("guidance_every", every, 1, MAX_EVERY)
    first, last = round(start * steps), round(end * steps)
    guided = (StepBranches.REUSED if (index - first) % every else StepBranches.BOTH for index in range(first, last))
    off = StepBranches.CONDITIONAL
    return (*(off,) * first, *guided, *(off,) * (steps - last))


def guide(unconditional: F32, conditional: F32, scale: np.float32 | F32) -> tuple[F32, F32]:
    """Combine the two branches (Ho and Salimans 2022, arXiv:2207.12598).

    Args:
        unconditional, conditional: Predictions float32 [images, C, h, w].
        scale: Guidance scale, one number or float32 [images, 1, 1, 1].

    Returns:
        The guided prediction and the guidance direction (conditional minus unconditional), shapes as given.
    """
    direction = conditional - unconditional
    return unconditional + scale * direction, direction


def rescale(guided: F32, conditional: F32, share: np.float32 | F32) -> F32:
    """Rescale guided predictions to the standard deviation of the conditional branch.

    This avoids overexposed images; see section 3.4 of Lin et al. 2023, arXiv:2305.08891.

    Args:
        guided: Predictions after guidance, float32 [images, C, h, w].
        conditional: Predictions of the conditional branch, of the same shape.
        share: Share of the rescaled prediction in the result, one number or float32 [images, 1, 1, 1].
    """
    axes = tuple(range(1, guided.ndim))
    wanted, given = (
        array.std(axes, dtype=np.float64, ddof=1, keepdims=True).astype(np.float32) for array in (conditional, guided)
    )
    result: F32 = share * (guided * (wanted / given)) + (1 - share) * guided
    return result
