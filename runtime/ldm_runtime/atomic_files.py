"""Writes files so that a reader sees the old content or the new one whole, and digests them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["sha256", "write_together", "write_whole"]

CHUNK = 4 * 2**20


def sha256(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Hex SHA-256 of a file; ``progress`` is told the bytes of each part read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
            progress(len(part))
    return digest.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or as it was before: to a neighbour, flushed, then renamed."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """``write_whole`` of several files: none of them is replaced before all are on the disk."""
    parts, made = {path: path.with_name(f".{path.name}.part") for path in contents}, list[Path]()
    try:
        for path, content in contents.items():
            made += [folder for folder in reversed(path.parents) if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            with parts[path].open("wb") as file:
                made.append(parts[path])
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    except BaseException:
        for path in reversed(made):
            with suppress(OSError):  # gone already, or a folder that has more in it by now
                path.rmdir() if path.is_dir() else path.unlink()
        raise
