"""The fields of a protobuf message: wire format of https://protobuf.dev/programming-guides/encoding, untrusted."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

__all__ = ["fields", "varint"]

MAX_VARINT = 10
"""Bytes of the longest varint."""
_VARINT, _LENGTH = 0, 2
_WIDTHS = {1: 8, 5: 4}
"""Wire type -> bytes of a field of fixed size."""


def fields(content: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the fields of a message that lies at ``position``..``end``; fields of a fixed size are left out.

    Yields:
        Number, start and end of a field that has a length; number, value and -1 of a varint.

    Raises:
        ValueError: The message is damaged.
        IndexError: It ends in the middle of a field.
    """
    while position < end:
        tag, position = varint(content, position)
        wire_type = tag & 7
        if wire_type == _LENGTH:
            size, start = varint(content, position)
            position = start + size
            if position > end:
                raise ValueError(f"a field of {size} bytes goes beyond its message")
            yield tag >> 3, start, position
        elif wire_type == _VARINT:
            value, position = varint(content, position)
            yield tag >> 3, value, -1
        elif wire_type in _WIDTHS:
            position += _WIDTHS[wire_type]
        else:
            raise ValueError(f"wire type {wire_type}")


def varint(content: mmap.mmap, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position after it; ValueError if it is too long."""
    value = content[position]
    position += 1
    if value < 0x80:
        return value, position
    value &= 0x7F
    for shift in range(7, 7 * MAX_VARINT, 7):
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a number of more than {MAX_VARINT} bytes")
