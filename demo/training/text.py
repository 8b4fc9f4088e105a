"""The demo model's tokenizer: BertTokenizer with a vocabulary of the grammar's words and single characters."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from transformers import BertTokenizer

from ldm_export_demo.grammar import BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES

TOKENS = 77
"""Every prompt is padded to this length, as LDMTextToImagePipeline does."""


def vocabulary() -> list[str]:
    """Special tokens, the grammar's words, then single characters and continuations, to spell others."""
    phrases = ("a an on background", *PLACES, *RELATIONS, *COLOURS, *SHAPES, *SIZES, *BACKGROUNDS)
    words = list(dict.fromkeys(word for phrase in phrases for word in phrase.split() if len(word) > 1))
    characters = string.ascii_lowercase + string.digits
    alone = list(characters + string.punctuation)
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *alone, *(f"##{c}" for c in characters)]


def make_tokenizer(folder: Path) -> BertTokenizer:
    """Write ``vocab.txt`` and the tokenizer's files into ``folder`` and load them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=True, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def token_ids(tokenizer: BertTokenizer, prompts: list[str]) -> torch.Tensor:
    """The prompts' token ids, int64 [B, TOKENS], padded as LDMTextToImagePipeline does."""
    return tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
