"""Reads pickles as data: nothing is imported or called, and the amount of data is limited.

``tensor_entries`` builds tensors from the returned records. Other objects of a training framework in a checkpoint
(callbacks, optimizers, schedulers) stay inert ``PickleRecord``s.
"""

from __future__ import annotations

import pickletools
import warnings
from typing import Any, BinaryIO

from ldm_export.originals.pickle_machine import PickleMachine
from ldm_runtime.errors import CheckpointError

__all__ = ["read_pickle"]

MAX_OPCODES = 8_000_000
"""Maximum number of opcodes of a pickle. The state of txt2img-f8-large, with its optimizer, has about 200,000."""
MAX_PIECE = 2**20
"""Maximum size in bytes of a text, bytes object or integer in one opcode."""


class _BoundedFile:
    """A file for ``pickletools`` that refuses to read long pieces and long lines."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_PIECE:
            raise ValueError(f"a piece of {size} bytes")
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(MAX_PIECE)
        if not line.endswith(b"\n"):
            raise ValueError("a line without end")
        return line


def read_pickle(file: BinaryIO, where: str) -> Any:
    """Read one pickle from the file's position, up to its STOP opcode.

    Args:
        file: Opened for reading.
        where: Start of error messages.

    Returns:
        Plain dicts, lists, tuples, texts and numbers; ``Global``, ``PersistentId`` and ``PickleRecord`` for the rest. A
        dict keeps keys that are texts or integers; others are replaced by objects, since computing a hash of an
        untrusted nested tuple may take unlimited time.

    Raises:
        CheckpointError: The pickle is damaged, truncated or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # odd escapes in the names of a damaged file
            return _run(file)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(
            f"{where}: not a pickle of torch.save ({type(error).__name__}: {cause:.120}); download the file again"
        ) from None


def _run(file: BinaryIO) -> Any:
    machine = PickleMachine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(_BoundedFile(file))):  # type: ignore[arg-type]
        if count > MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES} opcodes")
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    return machine.pop()
