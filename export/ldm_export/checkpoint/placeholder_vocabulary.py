"""Placeholder vocabularies of single characters or bytes, for checkpoints with random weights."""

from __future__ import annotations

import json
import shutil
import string
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["placeholder_clip_tokenizer", "placeholder_tokenizer"]


def placeholder_tokenizer(source: Path, target: Path) -> Path:
    """Write a BERT vocabulary of single characters and copies of the configs in ``source`` to the folder ``target``.

    Any vocabulary is sufficient, because tokens have no meaning with random weights.

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


def placeholder_clip_tokenizer(source: Path, target: Path) -> Path:
    """Write a CLIP vocabulary of single bytes and copies of the configs in ``source`` to the folder ``target``.

    Returns:
        ``target``.
    """
    for config in source.glob("*.json"):
        shutil.copyfile(config, target / config.name)
    letters = sorted(ByteLevel.alphabet())
    tokens = ["!", *(letter for letter in letters if letter != "!"), *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate((*tokens, "<|startoftext|>", "<|endoftext|>"))}
    (target / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (target / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return target
