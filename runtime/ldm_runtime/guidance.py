"""At which steps classifier-free guidance computes the unguided branch: at all of them, or at fewer."""

from __future__ import annotations

import reprlib
from enum import Enum

from ldm_runtime.errors import SpecError

WHOLE = (0.0, 1.0)


class Branches(Enum):
    """What one step computes.

    BOTH: the unguided and the prompted branch, and so the direction from the one to the other. HELD: the prompted
    branch, with the direction of the last step that had both. PROMPTED: the prompted branch, without guidance.
    """

    BOTH = "both"
    HELD = "held"
    PROMPTED = "prompted"


def branches(interval: tuple[float, float], every: int, steps: int) -> list[Branches]:
    """What each of so many steps computes.

    Args:
        interval: shares of the steps, 0 ≤ start ≤ end ≤ 1: guidance is on between them (Kynkäänniemi et al. 2024,
            arXiv:2404.07724).
        every: of the guided steps each so-manieth computes both branches; those between hold its direction, which
            changes little from a step to the next (as do the caches of Lv et al. 2024, arXiv:2410.19355).

    Raises:
        SpecError: not two such numbers, or no whole number from 1.
    """
    fits = isinstance(interval, list | tuple) and len(interval) == 2
    if not fits or any(isinstance(share, bool) or not isinstance(share, int | float) for share in interval):
        raise SpecError(f"guidance_interval: got {reprlib.repr(interval)}, expected two numbers from 0 to 1")
    start, end = interval
    if not 0 <= start <= end <= 1:
        raise SpecError(f"guidance_interval: got {start:g} to {end:g}, expected 0 <= start <= end <= 1")
    if type(every) is not int or every < 1:
        raise SpecError(f"guidance_every: got {every!r:.40}, expected a whole number of steps, 1 or more")
    first, last = round(start * steps), round(end * steps)
    guided = [Branches.HELD if (index - first) % every else Branches.BOTH for index in range(first, last)]
    return [Branches.PROMPTED] * first + guided + [Branches.PROMPTED] * (steps - last)
