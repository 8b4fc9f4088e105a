"""Finds and removes work folders that killed builds left beside a bundle."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm_export.bundle.publish import LOCK, work_path

__all__ = ["abandoned_work", "remove_abandoned"]


def abandoned_work(bundle: Path) -> Path | None:
    """Return the work folder beside a bundle that no running build uses, or None.

    A folder of another user is not returned, nor one whose lock cannot be tested, e.g. on a file system without locks.
    """
    with _held(bundle) as work:
        return work


def remove_abandoned(bundle: Path) -> Path | None:
    """Remove the work folder that ``abandoned_work`` finds, and return it; None if nothing was removed."""
    with _held(bundle) as work:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        return None if work is None or work.exists() else work


@contextmanager
def _held(bundle: Path) -> Iterator[Path | None]:
    """Yield the abandoned work folder, locked so that no build takes it meanwhile."""
    work = work_path(bundle.resolve())
    descriptor = -1
    try:
        try:
            facts = work.lstat()
            if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
                yield None
                return
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(work / LOCK, flags, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (OSError, ValueError):  # missing, in use, not writable, or an invalid name
            yield None
            return
        yield work
    finally:
        if descriptor >= 0:
            os.close(descriptor)
