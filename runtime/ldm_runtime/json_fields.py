"""Typed access to untrusted JSON; a wrong type raises ManifestError naming the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ldm_runtime.errors import ManifestError

_T = TypeVar("_T")


def mapping(where: str, value: Any) -> dict[str, Any]:
    """Return ``value``, which must be an object."""
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: got {type(value).__name__}, expected an object; rebuild the bundle")
    return value


def text(where: str, value: Any) -> str:
    """Return ``value``, which must be a string."""
    if not isinstance(value, str):
        raise ManifestError(f"{where}: got {value!r:.60}, expected a text; rebuild the bundle")
    return value


def each(where: str, value: Any, read: Callable[[str, Any], _T]) -> dict[str, _T]:
    """Read every value of an object with ``read``."""
    return {name: read(f"{where}.{name}", each) for name, each in mapping(where, value).items()}
