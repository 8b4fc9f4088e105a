"""Typed access to untrusted JSON. A wrong type raises a ManifestError that names the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ldm_runtime.errors import ManifestError
from ldm_runtime.regular_files import read_regular

__all__ = [
    "read_object",
    "require_integer",
    "require_list",
    "require_map",
    "require_number",
    "require_object",
    "require_str",
]

_T = TypeVar("_T")


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """Return the JSON object in a file of at most ``limit`` bytes; NaN and infinity are refused.

    Raises:
        ManifestError: The file cannot be read, or is not such an object.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(read_regular(path, limit, ManifestError), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON ({error}); rebuild the bundle") from None
    return require_object(str(path), value)


def require_object(where: str, value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a JSON object."""
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: got {type(value).__name__}, expected an object; rebuild the bundle")
    return value


def require_list(where: str, value: Any, most: int) -> list[Any]:
    """Return ``value`` if it is a JSON array of at most ``most`` entries."""
    if not isinstance(value, list) or len(value) > most:
        got = f"{len(value)} entries" if isinstance(value, list) else f"{value!r:.60}"
        raise ManifestError(f"{where}: got {got}, expected a list of at most {most}; rebuild the bundle")
    return value


def require_str(where: str, value: Any) -> str:
    """Return ``value`` if it is a string."""
    if not isinstance(value, str):
        raise ManifestError(f"{where}: got {value!r:.60}, expected a text; rebuild the bundle")
    return value


def require_integer(where: str, value: Any, low: int, high: int) -> int:
    """Return ``value`` if it is a whole number from ``low`` to ``high``."""
    if type(value) is not int or not low <= value <= high:
        raise ManifestError(f"{where}: got {value!r:.40}, expected a whole number from {low} to {high}; rebuild it")
    return value


def require_number(where: str, value: Any, low: float, high: float) -> float:
    """Return ``value`` as a float if it is a number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ManifestError(f"{where}: got {value!r:.40}, expected a number from {low:g} to {high:g}; rebuild it")
    return float(value)


def require_map(where: str, value: Any, read: Callable[[str, Any], _T]) -> dict[str, _T]:
    """Read every entry of a JSON object with ``read(where, value)``."""
    return {name: read(f"{where}.{name}", entry) for name, entry in require_object(where, value).items()}
