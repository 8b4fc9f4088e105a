"""Requests with a budget or with "auto" as their number of steps, which take a measured setting of the bundle."""

from __future__ import annotations

from dataclasses import replace

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import number
from ldm_runtime.quality import MEASURE, QualityRecord, QualityResult
from ldm_runtime.request import AUTO, Request

__all__ = ["settled"]

DECIDED = ("scheduler", "cache_every", "full_steps", "guidance_every")
"""Fields that a measured setting decides, or without which it was measured."""


def settled(
    request: Request, record: QualityRecord | None, precision: str | None = None
) -> tuple[Request, QualityResult | None]:
    """Replace ``budget`` and ``num_inference_steps="auto"`` of a request by the values of a measured setting.

    Args:
        request: A request that has neither of them is returned as it is.
        record: The measured settings of the bundle; None if it has none.
        precision: Precision that is loaded, which limits the choice; None for all.

    Returns:
        The request with numbers, and the setting that they are from; None if the request names no budget.

    Raises:
        SpecError: A field that the setting decides is given too, nothing was measured, or no setting is good enough.
    """
    auto = isinstance(request.num_inference_steps, str) and request.num_inference_steps == AUTO
    if request.budget is None and not auto:
        return request, None
    budget = None if request.budget is None else number("budget", request.budget)
    asked = "steps: got auto" if budget is None else f"budget: got {budget:g} dB"
    decided = DECIDED if auto else (*DECIDED, "num_inference_steps")
    if given := [name for name in decided if name in request.given()]:
        name = "steps" if given[0] == "num_inference_steps" else given[0]
        raise SpecError(f"{asked} and {name} too, but a measured setting decides {name}; leave one of them out")
    if record is None:
        raise SpecError(f"{asked}, but this bundle has no measured settings; measure them with {MEASURE}")
    taken = record.fewest_steps(budget, precision) if auto or budget is None else record.fastest(budget, precision)
    return replace(replace(request, budget=None), **taken.setting.options), taken
