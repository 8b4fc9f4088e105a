"""Accepted forms of a bundle's tokenizer.json: BERT's WordPiece and CLIP's byte-level BPE.

A file is checked before the library loads it, because a template with an undefined token causes a Rust panic, and an
arbitrary regular expression could take any time.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CLIP_SPACES", "CLIP_WORDS", "pad_token"]

CLIP_SPACES = r"\s+"
"""Regular expression of the spaces that CLIP's normalizer joins."""
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""Regular expression of the words into which CLIP splits a text (Radford et al. 2021)."""


def pad_token(document: Any) -> str | None:
    """The padding token of a parsed tokenizer.json: of its padding section, else [PAD]. None if it has neither form.

    Raises:
        TypeError, KeyError, AttributeError: An entry has a wrong type.
    """
    if not (_is_bert(document) or _is_clip(document)):
        return None
    match document:
        case {
            "model": {"vocab": {} as vocabulary, "unk_token": str(unknown)},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": str(first)}},
                    {"Sequence": {"id": "A"}},
                    {"SpecialToken": {"id": str(last)}},
                ],
                "special_tokens": {} as special,
            },
        }:
            padding = document.get("padding")
            pad = padding["pad_token"] if padding else "[PAD]"
            ids = [entry["ids"] for entry in (special.get(first), special.get(last)) if len(entry["tokens"]) == 1]
            if ids == [[vocabulary.get(first)], [vocabulary.get(last)]] and {pad, unknown} <= vocabulary.keys():
                return str(pad)
    return None


def _is_bert(document: Any) -> bool:
    match document:
        case {
            "model": {"type": "WordPiece"},
            "normalizer": {"type": "BertNormalizer"},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
        }:
            return True
    return False


def _is_clip(document: Any) -> bool:
    match document:
        case {
            "model": {"type": "BPE", "end_of_word_suffix": "</w>", "dropout": None},
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "NFC"},
                    {"type": "Replace", "pattern": {"Regex": spaces}, "content": " "},
                    {"type": "Lowercase"},
                ],
            },
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True},
                    {"type": "ByteLevel"},
                ],
            },
        }:
            return bool(spaces == CLIP_SPACES and words == CLIP_WORDS)
    return False
