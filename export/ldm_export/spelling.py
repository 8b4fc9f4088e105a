"""A stand-in vocabulary for checkpoints that are configs only: it spells every prompt, character by character."""

from __future__ import annotations

import shutil
import string
from pathlib import Path


def spelling_tokenizer(folder: Path, configs: Path) -> Path:
    """Write ``vocab.txt`` with BERT's special tokens and single characters, and copy the tokenizer's configs beside it.

    For random weights only, where no word means anything.
    """
    folder.mkdir(parents=True)
    for config in configs.glob("*.json"):
        shutil.copyfile(config, folder / config.name)
    characters = string.ascii_letters + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *characters, *string.punctuation, *(f"##{character}" for character in characters)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder
