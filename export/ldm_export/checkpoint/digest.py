"""A digest that identifies the weights of a checkpoint, whatever the name of its folder is."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ldm_runtime.atomic_files import sha256
from ldm_runtime.errors import CheckpointError

__all__ = ["CHECKPOINT_SHA256", "SUFFIXES", "weight_files", "weights_sha256"]

CHECKPOINT_SHA256 = "checkpoint_sha256"
"""Key of a manifest's ``request`` under which a build records the digest of its checkpoint's weights."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of weight files."""


def weight_files(folder: Path) -> dict[str, Path]:
    """Relative path -> file of every weight file in the component folders of a diffusers folder, sorted by path.

    For a checkpoint that is a single file, this file under its name.
    """
    if folder.is_file():
        return {folder.name: folder}
    files = [path for path in folder.glob("*/*") if path.suffix in SUFFIXES and path.is_file()]
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in files))


def weights_sha256(folder: Path) -> str:
    """Compute the SHA-256 of the lines ``PATH SHA-256`` of a checkpoint's weight files, sorted by path.

    Args:
        folder: A diffusers folder.

    Returns:
        64 hexadecimal digits. Checkpoints have the same digest only if they have the same weight files under the same
            paths. Configs and tokenizers are not included.

    Raises:
        CheckpointError: A weight file cannot be read.
    """
    try:
        lines = [f"{name} {sha256(path)}\n" for name, path in weight_files(folder).items()]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); check the checkpoint") from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()
