"""Converts the CLIP tokenizer folder of a checkpoint to the ``tokenizer.json`` of a bundle.

transformers reads the folder, so vocabulary, merges, special and added tokens are exactly those it uses. They are
written in the format of the ``tokenizers`` library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

from ldm_export.checkpoint.json_files import read_json
from ldm_export.checkpoint.tokenizer_files import MAX_TOKENS
from ldm_runtime.conditioning.tokenizer import MAX_BYTES, MAX_LENGTH
from ldm_runtime.conditioning.tokenizer_form import pad_token
from ldm_runtime.errors import CheckpointError

__all__ = ["CLIP_FILES", "DEFAULT_LENGTH", "clip_length", "read_clip_tokenizer", "write_clip_tokenizer_json"]

DEFAULT_LENGTH = 77
CLIP_FILES = ("vocab.json", "tokenizer.json")
"""Files of which a CLIP tokenizer's folder must have at least one; ``vocab.json`` also needs ``merges.txt``."""
_CONFIG = "tokenizer_config.json"
_FILES = (*CLIP_FILES, "merges.txt", _CONFIG, "special_tokens_map.json", "added_tokens.json")


def clip_length(folder: Path) -> int:
    """Number of tokens to which prompts are padded: ``model_max_length``, or 77 if that is unset or out of range.

    Raises:
        CheckpointError: ``tokenizer_config.json`` cannot be read.
    """
    file = folder / _CONFIG
    length = read_json(file, "tokenizer").get("model_max_length") if file.exists() else None
    return length if type(length) is int and 2 <= length <= MAX_LENGTH else DEFAULT_LENGTH


def read_clip_tokenizer(folder: Path, pad_token: str | None = None, added: Sequence[str] = ()) -> Any:
    """Read the tokenizer of a folder with transformers; nothing is downloaded.

    Args:
        folder: The folder.
        pad_token: Padding token to use instead of the folder's.
        added: Additional tokens, which get the next ids.

    Raises:
        CheckpointError: A file is missing, too large or damaged, or the tokenizer is not CLIP's.
    """
    for path in (folder / name for name in _FILES):
        if path.exists() and (not path.is_file() or path.stat().st_size > MAX_BYTES):
            raise CheckpointError(
                f"{path}: expected a file of at most {MAX_BYTES} bytes; download the checkpoint again"
            )
    if not (folder / "tokenizer.json").exists():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).exists():
                raise CheckpointError(f"tokenizer: {folder} has no {name}; download the checkpoint whole")
    _check_ids(folder)
    if (folder / _CONFIG).exists():
        name = read_json(folder / _CONFIG, "tokenizer").get("tokenizer_class", "CLIPTokenizer")
        if name not in ("CLIPTokenizer", "CLIPTokenizerFast"):
            raise CheckpointError(f"tokenizer: {folder / _CONFIG}: got class {name!r:.60}, expected CLIPTokenizer")
    given = {} if pad_token is None else {"pad_token": pad_token}
    try:
        tokenizer = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True, **given)
        tokenizer.add_tokens(list(added))
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises many classes, and tokenizers a PanicException
        cause = f"{type(error).__name__}: {' '.join(str(error).split()):.100}"
        raise CheckpointError(f"tokenizer: {folder}: not a CLIP tokenizer ({cause}); download it again") from None


def _check_ids(folder: Path) -> None:
    """Check that ids are not too large: the library fills gaps between ids, which could take much time and memory."""
    for name in CLIP_FILES:
        if not (folder / name).exists():
            continue
        content: Any = read_json(folder / name, "tokenizer")
        model = content.get("model") if name == "tokenizer.json" else {"vocab": content}
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        for token, index in vocabulary.items() if isinstance(vocabulary, dict) else ():
            if type(index) is not int or not 0 <= index < MAX_TOKENS:
                raise CheckpointError(
                    f"tokenizer: {folder / name}: token {token!r:.40} has id {index!r:.40}, expected 0 to "
                    f"{MAX_TOKENS - 1}; download it again"
                )


def write_clip_tokenizer_json(
    folder: Path, target: Path, padding: str | None = None, added: Sequence[str] = ()
) -> None:
    """Write the tokenizer to ``target``, with its padding token; equal folders give equal bytes.

    Args:
        folder, padding, added: See ``read_clip_tokenizer``.
        target: The file.

    Raises:
        CheckpointError: As ``read_clip_tokenizer``, or a special token is not in the vocabulary.
    """
    tokenizer = read_clip_tokenizer(folder, padding, added)
    backend = tokenizer.backend_tokenizer
    first, last, pad = (str(getattr(tokenizer, f"{role}_token")) for role in ("bos", "eos", "pad"))
    ids = {token: backend.token_to_id(token) for token in (first, last, pad)}
    if missing := [token for token, index in ids.items() if index is None]:
        raise CheckpointError(f"tokenizer: {folder}: {missing[0]!r:.40} is not in the vocabulary; download it again")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0",
        pair=f"{first}:0 $A:0 {last}:0 $B:0 {last}:0",
        special_tokens=[(token, ids[token]) for token in dict.fromkeys((first, last))],
    )
    backend.enable_padding(direction=tokenizer.padding_side, pad_id=ids[pad], pad_token=pad)
    backend.no_truncation()
    if tokenizer.truncation_side != "right":
        backend.enable_truncation(DEFAULT_LENGTH, direction=tokenizer.truncation_side)
    document = json.loads(backend.to_str())
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    if pad_token(document) is None:
        raise CheckpointError(
            f"tokenizer: {folder}: not CLIP's byte-level BPE with its special tokens in the vocabulary; use a "
            "checkpoint with a CLIPTokenizer"
        )
    target.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
