"""A PNG that claims a size and has no pixels."""

from __future__ import annotations

import struct
import zlib

__all__ = ["png_header"]


def png_header(width: int, height: int) -> bytes:
    """The file's bytes: RGB of 8 bits, with an empty chunk of pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
