"""Kills a process at one of the calls with which it changes files in a folder.

Python's audit events (https://docs.python.org/3/library/audit_events.html) announce each call before it is made. A file
that is opened for writing counts twice: the process is killed before it, or when a part of the content is written.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm_export.bundle import publish

__all__ = ["count_changes", "kill_at"]

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PART = b"half"


def kill_at(number: int, folder: Path, run: Callable[[], object]) -> None:
    """Run in this process, which ends with SIGKILL at the change of a number, counted from 0."""
    _watch(folder, lambda index, path: _kill(path) if index == number else None)
    run()


def count_changes(folder: Path, run: Callable[[], object]) -> int:
    """Run in this process, and return the number of changes."""
    counted = 0

    def count(index: int, path: str | None) -> None:
        nonlocal counted
        counted = index + 1

    _watch(folder, count)
    run()
    return counted


def _kill(path: str | None) -> None:
    if path is not None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, PART)
    os.kill(os.getpid(), signal.SIGKILL)


def _watch(folder: Path, on_change: Callable[[int, str | None], None]) -> None:
    """Call ``on_change`` before each change with its index, and with the path of a file that is to be half written."""
    root, next_index, busy = f"{folder.resolve()}/", 0, False

    def change(path: str | None) -> None:
        nonlocal next_index, busy
        index, next_index, busy = next_index, next_index + 1, True
        on_change(index, path)
        busy = False

    def inside(path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and str(absolute(path)).startswith(root)

    def absolute(path: Any) -> Path:
        return Path(os.fsdecode(path)).absolute()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if busy:
            return
        if event in CHANGES:
            relative = event in ("os.remove", "os.rmdir") and arguments[-1] != -1  # to a folder that shutil has opened
            if relative or any(map(inside, arguments[:2])):
                change(None)
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES and inside(arguments[0]):
            change(None)
            if not arguments[2] & os.O_APPEND and arguments[2] & os.O_ACCMODE == os.O_WRONLY:
                change(str(absolute(arguments[0])))

    exchange = publish._exchange

    def exchanged(one: Path, other: Path) -> bool:  # ctypes announces nothing
        change(None)
        return exchange(one, other)

    publish._exchange = exchanged
    sys.addaudithook(hook)
