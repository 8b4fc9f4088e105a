"""Response files: `ldm_stream` passes the tensors of a response to `ldm` in a file instead of through Triton.

Triton 24.10's Python backend builds the arrays of such a response without holding the GIL, so the receiving process
crashes if several arrive at once (fixed by pull request 394 of triton-inference-server/python_backend, January 2025).
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from ldm_runtime.triton.tensors import Tensors

__all__ = ["ResponseFiles"]

SHARED = Path("/dev/shm")
BYTES, SIZES = ".bytes", ".sizes"
"""Suffixes of the two arrays that hold a string tensor: its strings joined, and the length of each."""


class ResponseFiles:
    """Files by name, in a folder that the processes of one server share. They are in memory if /dev/shm exists.

    The waiting model creates an empty file. The responding model writes only to existing files, so an ID that a client
    invents creates none.
    """

    def __init__(self) -> None:
        place = SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
        self._folder = place / f"ldm-{os.getuid()}-{os.getppid()}"

    def create(self, name: str) -> None:
        """Create an empty file to wait for a response; ``name`` is new, and valid as a file name.

        Raises:
            OSError: The disk is full, or the folder belongs to another user.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def expects(self, name: str) -> bool:
        """True if a model waits for the response of this name."""
        return bool(name) and Path(name).name == name and (self._folder / name).is_file()

    def write(self, name: str, tensors: Tensors) -> None:
        """Write a response to an existing file.

        Raises:
            OSError: The disk is full.
        """
        plain: Tensors = {}
        for tensor, array in tensors.items():
            if array.dtype == object:
                plain[tensor + BYTES] = np.frombuffer(b"".join(array.ravel()), np.uint8)
                plain[tensor + SIZES] = np.array([len(text) for text in array.ravel()], np.int64)
            else:
                plain[tensor] = array
        with (self._folder / name).open("r+b") as file:
            np.savez(file, **plain)  # type: ignore[arg-type]

    def read(self, name: str) -> Tensors:
        """Read a response; no tensors if none has been written."""
        path = self._folder / name
        if not path.stat().st_size:
            return {}
        with np.load(path, allow_pickle=False) as file:
            plain = {key: file[key] for key in file.files}
        tensors = {key: array for key, array in plain.items() if not key.endswith((BYTES, SIZES))}
        for key in [key.removesuffix(SIZES) for key in plain if key.endswith(SIZES)]:
            ends = np.cumsum(plain[key + SIZES]).tolist()
            texts, starts = plain[key + BYTES].tobytes(), [0, *ends]
            tensors[key] = np.array([texts[start:end] for start, end in zip(starts, ends, strict=False)], object)
        return tensors

    def remove(self, name: str) -> None:
        """Remove a file; the response of this name is no longer expected."""
        (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder if it is empty."""
        with suppress(OSError):  # another process still waits for responses
            self._folder.rmdir()
