"""Checks of numbers that callers give: Python's and NumPy's are accepted, booleans and other types are not."""

from __future__ import annotations

import math
import operator
import reprlib
from typing import Any

import numpy as np

from ldm_runtime.errors import SpecError

__all__ = ["FLOAT32_MAX", "integer", "number", "shown"]

FLOAT32_MAX = float(np.finfo(np.float32).max)


def shown(value: Any) -> str:
    """A short representation of any value, at most about 60 characters, for an error message."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = reprlib.repr(value)
    except Exception:  # a caller's own __repr__ may raise anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number within bounds as an int.

    Raises:
        SpecError: Another type, or out of bounds.
    """
    try:
        found = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        found = None
    if found is None or not low <= found <= high:
        raise SpecError(f"{name}: got {shown(value)}, expected a whole number from {low} to {high}")
    return found


def number(name: str, value: Any, low: float = -FLOAT32_MAX, high: float = FLOAT32_MAX) -> float:
    """Return a finite number within bounds as a float.

    Raises:
        SpecError: Another type, NaN, infinite or out of bounds.
    """
    numeric = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        found = float(value) if numeric else math.nan
    except OverflowError:
        found = math.inf
    if not low <= found <= high:
        bounds = (
            "a finite number" if (low, high) == (-FLOAT32_MAX, FLOAT32_MAX) else f"a number from {low:g} to {high:g}"
        )
        raise SpecError(f"{name}: got {shown(value)}, expected {bounds}")
    return found
