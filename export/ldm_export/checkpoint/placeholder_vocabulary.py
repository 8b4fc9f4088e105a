"""Placeholder vocabulary for checkpoints without weights: its tokens are single characters."""

from __future__ import annotations

import shutil
import string
from pathlib import Path

__all__ = ["placeholder_tokenizer"]


def placeholder_tokenizer(source: Path, target: Path) -> Path:
    """Write a BERT vocabulary of single characters and the configs of ``source`` to the folder ``target``.

    Any vocabulary will do, because random weights attach no meaning to tokens.

    Returns:
        ``target``.
    """
    for config in source.glob("*.json"):
        shutil.copyfile(config, target / config.name)
    characters = string.ascii_letters + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *characters, *string.punctuation, *(f"##{character}" for character in characters)]
    (target / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return target
