"""CLIP tokenizers: a small one with every byte and a few merges, and the one that is published."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from importlib.metadata import files
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["END", "START", "WORDS", "clip_tokenizer", "published_merges"]

WORDS = ("a", "red", "green", "circle", "square", "photo", "café", "and", "the", "don", "ing", "ß", "ñ", "日", "n't")
START, END = "<|startoftext|>", "<|endoftext|>"
PACKAGE, FILE, LAST = "open-clip-torch", "bpe_simple_vocab_16e6.txt.gz", 49152 - 256 - 2
"""The package that holds CLIP's merges, their file, and the last of its lines that CLIP uses."""
Merge = tuple[str, str]


def merges_of(words: Sequence[str]) -> list[Merge]:
    """Merges that make one token of each word, with the last letter as the end of a word."""
    merges = []
    for word in words:
        first, *rest = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
        letters = [first, *rest]
        letters[-1] += "</w>"
        merges += [("".join(letters[:place]), letters[place]) for place in range(1, len(letters))]
    return list(dict.fromkeys(merges))


def published_merges() -> list[Merge]:
    """The merges of OpenAI's CLIP; fails where the package is not installed."""
    (found,) = [file for file in files(PACKAGE) or () if file.name == FILE]
    lines = gzip.decompress(Path(str(found.locate())).read_bytes()).decode().split("\n")
    return [(left, right) for left, right in (line.split() for line in lines[1 : LAST + 1])]


def clip_tokenizer(folder: Path, merges: Sequence[Merge] | None = None, *, pad_token: str = END, **config: Any) -> Path:
    """Write vocab.json, merges.txt and tokenizer_config.json of a tokenizer, as published checkpoints have them.

    Ids are those of CLIP: the printable bytes in their order, the others, both again as ends of words, the merges, and
    the special tokens.
    """
    merges = merges_of(WORDS) if merges is None else merges
    alphabet = set(ByteLevel.alphabet())
    letters = [letter for letter in map(chr, range(256)) if letter in alphabet]
    letters += sorted(alphabet - set(letters))
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *dict.fromkeys(left + right for left, right in merges),
    ]
    vocabulary = {token: index for index, token in enumerate((*tokens, START, END))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
