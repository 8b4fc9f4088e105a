"""Checks numbers that callers give: Python and NumPy numbers are accepted, booleans and other types are not."""

from __future__ import annotations

import operator
import reprlib
from typing import Any

import numpy as np

from ldm_runtime.errors import SpecError

__all__ = ["FLOAT32_MAX", "MAX_SECONDS", "as_float", "as_integer", "integer", "number", "seconds", "shown", "threads"]

FLOAT32_MAX = float(np.finfo(np.float32).max)
MAX_SECONDS = 1e9
"""Longest timeout, about 30 years; the clocks and locks of operating systems do not take much longer ones."""
MAX_THREADS = 1024


def shown(value: Any) -> str:
    """A representation of any value on one line of at most 60 characters, for an error message."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = " ".join(reprlib.repr(value).split())
    except Exception:  # a caller's own __repr__ may raise anything
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_integer(value: Any) -> int | None:
    """Return a Python or NumPy integer as an int; None for a boolean or anything else."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_float(value: Any) -> float | None:
    """Return a Python or NumPy number as a float; None for a boolean, anything else, or one too large for a float."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number within bounds as an int.

    Raises:
        SpecError: It has another type, or is out of bounds.
    """
    result = as_integer(value)
    if result is None or not low <= result <= high:
        raise SpecError(f"{name}: got {shown(value)}, expected a whole number from {low} to {high}")
    return result


def number(name: str, value: Any, low: float = -FLOAT32_MAX, high: float = FLOAT32_MAX) -> float:
    """Return a finite number within bounds as a float.

    Raises:
        SpecError: It has another type, or is NaN, infinite or out of bounds.
    """
    result = as_float(value)
    if result is None or not low <= result <= high:
        unbounded = (low, high) == (-FLOAT32_MAX, FLOAT32_MAX)
        expected = "a finite number of float32's range" if unbounded else f"a number from {low:g} to {high:g}"
        raise SpecError(f"{name}: got {shown(value)}, expected {expected}")
    return result


def seconds(name: str, value: Any) -> float:
    """Return a number of seconds above 0, at most MAX_SECONDS, as a float.

    Raises:
        SpecError: It has another type, or is NaN or out of bounds.
    """
    result = as_float(value)
    if result is None or not 0 < result <= MAX_SECONDS:
        raise SpecError(f"{name}: got {shown(value)}, expected a number of seconds above 0 and up to {MAX_SECONDS:g}")
    return result


def threads(value: Any) -> int | None:
    """Return a number of CPU threads as an int; None, for all cores, stays None.

    Raises:
        SpecError: It has another type, or is out of bounds.
    """
    if value is None:
        return None
    result = as_integer(value)
    if result is None or not 1 <= result <= MAX_THREADS:
        raise SpecError(f"threads: got {shown(value)}, expected 1..{MAX_THREADS}; leave it out for all cores")
    return result
