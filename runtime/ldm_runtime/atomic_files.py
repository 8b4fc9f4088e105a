"""Writes files so that a reader sees the old content or the new one whole, and digests them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ldm_runtime.errors import BuildError

__all__ = ["destination", "sha256", "write_together", "write_whole"]

CHUNK = 4 * 2**20


def sha256(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Hex SHA-256 of a file; ``progress`` is called with the bytes of each part that is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
            progress(len(part))
    return digest.hexdigest()


def destination(path: Path) -> Path:
    """Return the regular file that writing to ``path`` creates or replaces: for a link, the file it points to.

    Raises:
        BuildError: A device, a pipe, a socket or a folder has this name, or a link leads nowhere. Replacing a device
            such as /dev/null by a file would damage the system.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:
        raise BuildError(f"{path}: cannot be written ({error.strerror}); choose another name") from None
    if not target.name or stat.S_ISDIR(mode):
        raise BuildError(f"{path}: is a folder, expected the name of a file; choose another name")
    if not stat.S_ISREG(mode):
        raise BuildError(f"{path}: is {_kind(mode)}, expected a regular file; choose another name")
    return target


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a link that leads to itself"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or as it was before: to a neighbour, flushed, then renamed.

    Raises:
        BuildError: As ``destination``.
        OSError: The disk is full or refuses.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """``write_whole`` of several files: none of them is replaced before all are on the disk."""
    targets = {destination(path): content for path, content in contents.items()}
    parts, created = {path: path.with_name(f".{path.name}.part") for path in targets}, list[Path]()
    try:
        for path, content in targets.items():
            created += [folder for folder in reversed(path.parents) if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                parts[path].unlink()  # left by a killed process, or a link that must not be followed
            with parts[path].open("xb") as file:
                created.append(parts[path])
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    except BaseException:
        for path in reversed(created):
            with suppress(OSError):  # gone already, or a folder that has more in it by now
                path.rmdir() if path.is_dir() else path.unlink()
        raise
