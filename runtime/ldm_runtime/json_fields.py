"""Fields of a JSON document from a stranger: each of the expected type, or one line that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ldm_runtime.errors import ManifestError

_T = TypeVar("_T")


def mapping(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: got {type(value).__name__}, expected an object; rebuild the bundle")
    return value


def text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ManifestError(f"{where}: got {value!r:.60}, expected a text; rebuild the bundle")
    return value


def each(where: str, value: Any, read: Callable[[str, Any], _T]) -> dict[str, _T]:
    return {name: read(f"{where}.{name}", each) for name, each in mapping(where, value).items()}
