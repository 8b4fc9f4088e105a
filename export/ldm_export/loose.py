"""Values of a bundle's report files as far as they are what they should be: what is not is left out, not refused.

A page that only shows them need not fail on one that a later version writes in another form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is an object of JSON, else an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> Sequence[Mapping[str, Any]]:
    """The objects of a list, none where it is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def finite(value: Any) -> float | None:
    """The value where it is a finite number of float64's range, else None."""
    if type(value) is int and abs(value) < 2**63:
        return value
    return value if type(value) is float and math.isfinite(value) else None
