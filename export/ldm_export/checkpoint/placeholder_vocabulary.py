"""A stand-in vocabulary for checkpoints that are configs only: it spells every prompt, character by character."""

from __future__ import annotations

import shutil
import string
from pathlib import Path

from ldm_export.checkpoint.folder import Checkpoint


def tokenizer_folder(checkpoint: Checkpoint, room: Path) -> Path:
    """The checkpoint's tokenizer; for random weights without a vocabulary, a stand-in made in the folder ``room``.

    The stand-in has BERT's special tokens and single characters, and the checkpoint's tokenizer configs beside them:
    with random weights no word means anything.
    """
    source = checkpoint.tokenizer
    if checkpoint.random_seed is None or any((source / name).exists() for name in ("vocab.txt", "tokenizer.json")):
        return source
    for config in source.glob("*.json"):
        shutil.copyfile(config, room / config.name)
    characters = string.ascii_letters + string.digits
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = [*special, *characters, *string.punctuation, *(f"##{character}" for character in characters)]
    (room / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return room
