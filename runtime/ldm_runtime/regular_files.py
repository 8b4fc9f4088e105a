"""Reads files that others have written or named: regular files of bounded size, never a pipe, a device or more."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from ldm_runtime.errors import LdmError

__all__ = ["OPEN_FLAGS", "read_regular"]

OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags that open a file for reading without waiting for the writer of a pipe."""


def read_regular(path: Path, limit: int, error: Callable[[str], LdmError]) -> bytes:
    """Return the content of a regular file.

    At most as many bytes as the file says it has are read, so that the endless files of /proc are empty.

    Args:
        path: Path of the file.
        limit: Largest size in bytes.
        error: Class of the errors.

    Raises:
        LdmError: An ``error``: the file is missing, a folder, a pipe, a device, too large, or cannot be read.
    """
    try:
        descriptor = os.open(path, OPEN_FLAGS)
        with os.fdopen(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise error(f"{path}: is no regular file; give a file")
            if facts.st_size > limit:
                raise error(f"{path}: {facts.st_size} bytes, expected at most {limit}; give another file")
            return file.read(facts.st_size)
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror}); check the path and its permissions") from None
