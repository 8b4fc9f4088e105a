"""Checks of scheduler options; every failure is a SpecError that names the option."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import FLOAT32_MAX, as_float, as_integer, shown

__all__ = [
    "FLOAT32_MAX",
    "among",
    "beta",
    "choice",
    "eta_value",
    "fail",
    "integer",
    "positive",
    "real",
    "shown",
    "step_count",
    "switch",
]


def fail(name: str, value: object, expected: str) -> SpecError:
    """Return the error for an option ``name`` of a scheduler that got ``value``."""
    return SpecError(f"scheduler: {name}: got {shown(value)}, expected {expected}")


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Return an integer in low..high; NumPy's integers are accepted, booleans are not.

    Raises:
        SpecError: ``value`` is no such integer.
    """
    result = as_integer(value)
    if result is None or not low <= result <= high:
        raise fail(name, value, f"{low}..{high}")
    return result


def real(name: str, value: Any, low: float, high: float) -> float:
    """Return a number in [low, high] as a float; NumPy's numbers are accepted, booleans are not.

    Raises:
        SpecError: ``value`` is no such number.
    """
    result = as_float(value)
    if result is None or not low <= result <= high:
        raise fail(name, value, f"a number in [{low:g}, {high:g}]")
    return result


def positive(name: str, value: Any) -> float:
    """Return a finite number above zero as a float.

    Raises:
        SpecError: ``value`` is no such number.
    """
    result = as_float(value)
    if result is None or not 0 < result <= FLOAT32_MAX:
        raise fail(name, value, "a finite number > 0")
    return result


def beta(name: str, value: Any) -> float:
    """Return a number in the open interval (0, 1) as a float.

    Raises:
        SpecError: ``value`` is no such number.
    """
    result = as_float(value)
    if result is None or not 0 < result < 1:
        raise fail(name, value, "a number in (0, 1)")
    return result


def switch(name: str, value: Any) -> bool:
    """Return a boolean. 0 and 1 stand for false and true, and None for false, as in diffusers.

    Raises:
        SpecError: ``value`` is anything else.
    """
    if value is None or isinstance(value, (bool, np.bool_)) or as_integer(value) in (0, 1):
        return bool(value)
    raise fail(name, value, "true or false")


def among(value: Any, allowed: Collection[Any]) -> bool:
    """True if ``value`` equals one of ``allowed``; False for arrays, which have no single truth value."""
    try:
        return value in allowed
    except ValueError:
        return False


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """Return one of the strings ``allowed``.

    Raises:
        SpecError: ``value`` is another.
    """
    if not isinstance(value, str) or value not in allowed:
        raise fail(name, value, f"one of {', '.join(allowed)}")
    return value


def step_count(value: Any, highest: int) -> int:
    """Return the number of inference steps, 1..highest.

    Raises:
        SpecError: ``value`` is no such integer.
    """
    result = as_integer(value)
    if result is None or not 1 <= result <= highest:
        raise SpecError(f"steps: got {shown(value)}, expected 1..{highest}")
    return result


def eta_value(value: Any) -> float:
    """Return eta as a float: 0 is deterministic, 1 is as noisy as DDPM.

    Raises:
        SpecError: ``value`` is no finite number, or negative.
    """
    result = as_float(value)
    if result is None or not (math.isfinite(result) and 0 <= result <= FLOAT32_MAX):
        raise SpecError(f"eta: got {shown(value)}, expected a finite number >= 0; 0 to 1 is usual")
    return result
