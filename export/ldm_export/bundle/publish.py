"""Puts a finished folder in its place at once: whoever looks sees the old one whole or the new one whole."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def publish(finished: Path, target: Path) -> None:
    """Rename ``finished`` to ``target``; a folder already there is exchanged with it, then removed.

    Raises:
        OSError: the file system refuses.
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
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
