"""Reads untrusted files: only regular files of limited size, no pipes or devices."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from ldm_runtime.errors import LdmError

__all__ = ["OPEN_FLAGS", "read_regular"]

OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags for opening a file for reading, without waiting for the writer if it is a pipe."""


def read_regular(path: Path, limit: int, error: Callable[[str], LdmError]) -> bytes:
    """Return the content of a regular file.

    Only as many bytes are read as the file's size says, so endless files such as those of /proc are read as empty.

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
                raise error(f"{path}: is not a regular file; give a file")
            if facts.st_size > limit:
                raise error(f"{path}: {facts.st_size} bytes, expected at most {limit}; give another file")
            return file.read(facts.st_size)
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror}); check the path and its permissions") from None
