"""A placeholder vocabulary for checkpoints that are configs only: it spells every prompt, character by character."""

from __future__ import annotations

import shutil
import string
from pathlib import Path

__all__ = ["placeholder_tokenizer"]


def placeholder_tokenizer(source: Path, target: Path) -> Path:
    """Write a BERT vocabulary of single characters, and the configs of ``source`` beside it, to the folder ``target``.

    With random weights no word means anything, so any vocabulary will do.

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
