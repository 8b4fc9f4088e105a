"""Writes files atomically, so that a reader sees either the old or the new content, and computes their SHA-256."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm_runtime.errors import BuildError

__all__ = ["destination", "sha256", "write_together", "write_whole", "written_beside"]

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
    """Write a file atomically: to a temporary file beside it, which is flushed and then renamed.

    Raises:
        BuildError: As ``destination``.
        OSError: The disk is full or cannot be written.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write several files so that a reader never finds old and new ones together.

    All new files are written as hidden files in the same folders before anything changes. A single file is then renamed
    over the old one. With several files, the old ones are first renamed to other hidden names: a process that is killed
    in between leaves some of the old files or some of the new ones. The next call for the same files removes the hidden
    files.

    Raises:
        BuildError: As ``destination``.
        OSError: The disk is full or cannot be written; the files are unchanged.
    """
    with written_beside({destination(path): content for path, content in contents.items()}) as parts:
        moved: dict[Path, Path] = {}
        try:
            if len(parts) > 1:
                for path in parts:
                    with suppress(FileNotFoundError):
                        moved[path] = path.replace(_neighbour(path, "old"))
            for path, part in parts.items():
                part.replace(path)
        except BaseException:
            for path in parts if moved else ():
                path.unlink(missing_ok=True)
            for path, old in moved.items():
                old.replace(path)
            raise
    for path in parts:
        _neighbour(path, "old").unlink(missing_ok=True)


@contextmanager
def written_beside(contents: Mapping[Path, bytes], kind: str = "part") -> Iterator[dict[Path, Path]]:
    """Write new contents to hidden files beside the targets; the block renames them to the targets.

    Args:
        contents: Target, a regular file or a path that does not exist yet -> its new content.
        kind: Suffix of the hidden files.

    Yields:
        Target -> its hidden file, which has been written. After an error, hidden files and new folders are removed.
    """
    parts = {path: _neighbour(path, kind) for path in contents}
    folders = list[Path]()
    try:
        for path, part in parts.items():
            folders += [folder for folder in reversed(path.parents) if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)  # left by a killed process, or a link that must not be followed
            with part.open("xb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        yield parts
    except BaseException:
        for part in parts.values():
            with suppress(OSError):
                part.unlink()
        for folder in reversed(folders):
            with suppress(OSError):  # it has more in it by now
                folder.rmdir()
        raise


def _neighbour(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")
