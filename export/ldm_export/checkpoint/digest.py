"""The digest by which a checkpoint's weights are recognised, whatever its folder is called."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ldm_runtime.atomic_files import sha256
from ldm_runtime.errors import CheckpointError

__all__ = ["SUFFIXES", "weights_sha256"]

SUFFIXES = (".safetensors", ".bin", ".pt")
"""Suffixes of weight files."""


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a checkpoint's weight files: of one line ``PATH SHA-256`` for each file, sorted by path.

    Args:
        folder: A diffusers folder; weight files are the files with one of ``SUFFIXES`` in its component folders.

    Returns:
        64 hexadecimal digits. Two checkpoints have the same digest exactly if they have the same weight files under
        the same paths; configs and tokenizers do not count.

    Raises:
        CheckpointError: A weight file cannot be read.
    """
    try:
        files = sorted(path for path in folder.glob("*/*") if path.suffix in SUFFIXES and path.is_file())
        lines = [f"{path.relative_to(folder).as_posix()} {sha256(path)}\n" for path in files]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); check the checkpoint") from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()
