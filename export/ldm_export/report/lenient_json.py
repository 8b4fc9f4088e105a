"""Values of a bundle's report files as far as they are what they should be: what is not is left out, not refused.

A page that only shows them need not fail on one that a later version writes in another form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SMALLEST = 1e-30


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is an object of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> Sequence[Mapping[str, Any]]:
    """The objects of a list, none where it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def finite(value: Any) -> float | None:
    """The value where it is a number of a size that something measured has: 0, or from 1e-30 to 1e30; else None."""
    if type(value) not in (int, float) or not (value == 0 or SMALLEST <= abs(value) <= 1 / SMALLEST):
        return None
    found: float = value
    return found
