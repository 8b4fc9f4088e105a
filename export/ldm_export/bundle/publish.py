"""The work folder of a build, and the atomic replacement of a bundle by the finished build."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm_runtime.errors import BuildError

__all__ = ["publish", "work_folder"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Create a hidden folder beside ``target`` for the finished stages of a build.

    After a killed or interrupted build it stays, so that the next build can resume; after an error it is removed.

    Raises:
        BuildError: Another build of the same target is running, or the folder cannot be written.
    """
    work = target.parent / f".{target.name}.part"
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise BuildError(f"{target.parent}: cannot be written ({error.strerror}); choose another -o") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(os.fstat(lock.fileno()), (work / "lock").stat())
        except (BlockingIOError, FileNotFoundError):
            locked = False  # locked by another build, or removed by it at its end
        if not locked:
            raise BuildError(f"{target}: another build is writing it; wait for it or choose another -o")
        try:
            yield work
        except Exception as error:
            shutil.rmtree(work, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            what, where = error.strerror or error, error.filename or target
            raise BuildError(f"{where}: {what}; free some disk space or choose another -o") from error


def publish(finished: Path, target: Path) -> None:
    """Rename ``finished`` to ``target``; a folder already there is exchanged with it, then removed.

    A reader sees the whole old folder or the whole new one.

    Raises:
        OSError: The file system refuses.
    """
    if not target.exists():
        finished.rename(target)
    elif _exchange(finished, target):
        shutil.rmtree(finished)
    else:  # a file system without exchange: for an instant the target is absent
        old = finished.with_name(f"{finished.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        finished.rename(target)
        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """renameat2(RENAME_EXCHANGE), see rename(2); False where the system has none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return result == 0
