"""Answers that `ldm_stream` leaves for `ldm` in files: a model's tensors must not come to another through Triton.

Triton 24.10's python backend makes the arrays of such an answer without Python's lock, and when several come at once
the process that asked dies (mended by pull request 394 of triton-inference-server/python_backend, January 2025).
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from ldm_runtime.triton.tensors import Tensors

SHARED = Path("/dev/shm")
BYTES, SIZES = ".bytes", ".sizes"
"""Behind the name of a tensor of texts: all of them, one after the other, and how long each is."""


class ResponseFiles:
    """Files by name, in a folder that the processes of one server share; in memory where the system has that.

    Who waits for an answer opens a parcel; who has the answer fills it, if it is open: names that nobody waits for, as
    those a stranger makes up, write nothing.
    """

    def __init__(self) -> None:
        place = SHARED if os.access(SHARED, os.W_OK) else Path(tempfile.gettempdir())
        self._folder = place / f"ldm-{os.getuid()}-{os.getppid()}"

    def open(self, name: str) -> None:
        """Wait for an answer; ``name`` is fresh and a file's name.

        Raises:
            OSError: no room, or the folder is another user's.
        """
        self._folder.mkdir(mode=0o700, exist_ok=True)
        os.close(os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def awaited(self, name: str) -> bool:
        """True where the answer is to be left here."""
        return bool(name) and Path(name).name == name and (self._folder / name).is_file()

    def fill(self, name: str, tensors: Tensors) -> None:
        """Leave an answer.

        Raises:
            OSError: no room.
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

    def take(self, name: str) -> Tensors:
        """The answer of a filled parcel; nothing of one that is empty."""
        path = self._folder / name
        if not path.stat().st_size:
            return {}
        with np.load(path, allow_pickle=False) as file:
            plain = {key: file[key] for key in file.files}
        found = {key: array for key, array in plain.items() if not key.endswith((BYTES, SIZES))}
        for key in [key.removesuffix(SIZES) for key in plain if key.endswith(SIZES)]:
            ends = np.cumsum(plain[key + SIZES]).tolist()
            texts, starts = plain[key + BYTES].tobytes(), [0, *ends]
            found[key] = np.array([texts[start:end] for start, end in zip(starts, ends, strict=False)], object)
        return found

    def drop(self, name: str) -> None:
        """Wait no longer."""
        (self._folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):  # another process has parcels in it still
            self._folder.rmdir()
