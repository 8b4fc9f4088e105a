"""Lenient access to the JSON of a bundle's report files: a value of an unexpected type is skipped, not refused.

A page that only displays values need not fail on a report that a later version wrote in another form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["finite", "mapping", "mappings"]

SMALLEST = 1e-30


def mapping(value: Any) -> Mapping[str, Any]:
    """Return the value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> Sequence[Mapping[str, Any]]:
    """Return the JSON objects of a list; none if the value is not a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def finite(value: Any) -> float | None:
    """Return the value if it is 0 or a number of magnitude 1e-30 to 1e30, as measurements are; else None."""
    if type(value) not in (int, float) or not (value == 0 or SMALLEST <= abs(value) <= 1 / SMALLEST):
        return None
    number: float = value
    return number
