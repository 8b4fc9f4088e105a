"""Writes the text format of protocol buffers, for Triton's config.pbtxt, without a protobuf package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Enum", "MapOf", "to_pbtxt"]


class Enum(str):
    """Name of an enum value, written without quotes, e.g. KIND_CPU."""


def to_pbtxt(message: Mapping[str, Any]) -> str:
    """Write a message as text, with two spaces of indentation per level.

    A mapping is a message, a ``MapOf`` a map field, a list a repeated field. Strings are quoted, ``Enum``s not.
    """
    return "\n".join(_fields(message, "")) + "\n"


class MapOf(dict[str, Any]):
    """A map field, written as entries with ``key`` and ``value``."""


def _fields(message: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, MapOf):
            for key, entry in value.items():
                yield from _field(name, {"key": key, "value": entry}, indent)
        elif isinstance(value, list | tuple) and not all(isinstance(item, int) for item in value):
            for item in value:
                yield from _field(name, item, indent)
        else:
            yield from _field(name, value, indent)


def _field(name: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{indent}{name} {{"
        yield from _fields(value, f"{indent}  ")
        yield f"{indent}}}"
    else:
        yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(str, value))}]"
    return json.dumps(value, ensure_ascii=True) if isinstance(value, str) else str(value)
