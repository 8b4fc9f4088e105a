"""Textual inversion: adds files of learned embeddings to the tokenizers and text encoders of a checkpoint.

It is described by Gal et al. 2022, arXiv:2208.01618. Supported are files of diffusers (``{"<token>": vectors}``) and of
AUTOMATIC1111's web UI (``string_to_param``, ``emb_params``, and ``clip_l`` with ``clip_g`` for Stable Diffusion XL).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import parameter_shapes
from ldm_export.checkpoint.weights import DTYPES, StoredTensor
from ldm_export.families.clip_text import clip_tokenizer
from ldm_export.originals.checkpoint_file import read_state_dict, read_text
from ldm_runtime.atomic_files import sha256
from ldm_runtime.errors import CheckpointError

__all__ = ["GivenEmbedding", "parse_embedding", "with_embeddings"]

ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
XL_KEYS = ("clip_l", "clip_g")
"""Tensors of a file for both encoders, in the order of ``ENCODERS``."""
NAMELESS = ("*", "emb_params", *XL_KEYS)
"""Names of tensors that are not tokens."""
WEB_UI_ENTRY, WEB_UI_TOKEN = "string_to_param", "name"
MAX_VECTORS = 75


@dataclass(frozen=True)
class GivenEmbedding:
    """A file of embeddings, and the token that stands for them in prompts; None is the token in the file."""

    file: Path
    token: str | None = None


def parse_embedding(text: str) -> GivenEmbedding:
    """Parse ``FILE`` or ``FILE:TOKEN``.

    Raises:
        CheckpointError: There is no such file, or the token is empty or has spaces.
    """
    name, _, token = ("", "", "") if Path(text).is_file() else text.rpartition(":")
    given = GivenEmbedding(Path(name or text), token if name else None)
    if not given.file.is_file():
        raise CheckpointError(f"embedding: {given.file}: no such file, expected FILE or FILE:TOKEN; check the path")
    if given.token is not None and given.token.split() != [given.token]:
        raise CheckpointError(f"embedding: {given.file}: got token {given.token!r:.60}, expected a text without spaces")
    return given


def with_embeddings(checkpoint: Checkpoint, given: Sequence[GivenEmbedding]) -> Checkpoint:
    """Return a checkpoint with additional tokens, as diffusers' ``load_textual_inversion`` adds them one by one.

    Several vectors of a file become the tokens ``token``, ``token_1``, …; the first in a prompt stands for all of them.

    Raises:
        CheckpointError: A file cannot be read or is of another kind, its vectors do not fit the text encoders, or a
            token exists already.
    """
    for one in given:
        checkpoint = _with_embedding(checkpoint, one)
    return checkpoint


def _with_embedding(checkpoint: Checkpoint, given: GivenEmbedding) -> Checkpoint:
    parts = [(tokenizer, part) for tokenizer, part in ENCODERS if part in checkpoint.components]
    if not all(checkpoint.components[part].class_name.startswith("CLIPText") for _, part in parts) or not parts:
        raise CheckpointError(f"{given.file}: a model of {checkpoint.family} takes no embeddings; leave it out")
    tensors, own_token = _vectors(given.file, len(parts))
    token = given.token or own_token
    facts = {"file": given.file.name, "sha256": sha256(given.file), "token": token}
    components, added = dict(checkpoint.components), dict(checkpoint.added_tokens)
    for (name, part), stored in zip(parts, tensors, strict=True):
        component = components[part]
        count = _check_shape(given.file, stored, part, component.config["hidden_size"])
        tokens = [token, *(f"{token}_{number}" for number in range(1, count))]
        rows = _new_ids(given.file, clip_tokenizer(checkpoint, name, part), tokens)
        key = next(key for key in parameter_shapes(checkpoint, part) if key.endswith("token_embedding.weight"))
        components[part] = replace(
            component,
            changes=(*component.changes, {key: partial(_with_rows, stored, rows)}),
            depends={**component.depends, "embeddings": [*component.depends.get("embeddings", []), facts]},
        )
        added[name] = (*added.get(name, ()), *tokens)
    embeddings = (*checkpoint.embeddings, facts)
    return replace(checkpoint, components=components, added_tokens=added, embeddings=embeddings)


def _vectors(file: Path, encoders: int) -> tuple[list[StoredTensor], str]:
    """Return the vectors for each encoder and the token: that in the file, or the file's name."""
    tensors: Mapping[str, StoredTensor] = read_state_dict(file, WEB_UI_ENTRY)
    if encoders == 2 and set(tensors) == set(XL_KEYS):
        return [tensors[key] for key in XL_KEYS], file.stem
    if encoders == 1 and len(tensors) == 1:
        ((name, stored),) = tensors.items()
        return [stored], (read_text(file, WEB_UI_TOKEN) or file.stem) if name in NAMELESS else name
    wanted = f"the tensors {' and '.join(XL_KEYS)} for two text encoders" if encoders == 2 else "one tensor"
    got = ", ".join(list(tensors)[:3])
    raise CheckpointError(f"{file}: got the tensors {got:.200}, expected {wanted}; give an embedding for this model")


def _check_shape(file: Path, stored: StoredTensor, part: str, width: int) -> int:
    """The number of vectors."""
    count = stored.shape[0] if len(stored.shape) == 2 else 1
    fits = len(stored.shape) in (1, 2) and stored.shape[-1] == width and 1 <= count <= MAX_VECTORS
    if not fits or stored.dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: {stored.name}: got {stored.dtype} {list(stored.shape)}, expected up to {MAX_VECTORS} vectors of "
            f"{width} numbers for the {part}; use an embedding that was trained for this base model"
        )
    return count


def _new_ids(file: Path, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Return the ids that the tokenizer assigns to new tokens."""
    known = tokenizer.get_vocab()
    if existing := [token for token in (*tokens, f"{tokens[0]}_1") if token in known]:
        raise CheckpointError(
            f"{file}: token {existing[0]!r:.60} exists in the tokenizer; give another one as {file.name}:TOKEN"
        )
    tokenizer.add_tokens(list(tokens))
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


def _with_rows(stored: StoredTensor, rows: Sequence[int], weight: torch.Tensor) -> torch.Tensor:
    """Return the embeddings float32 [tokens, D] with those of a file in the given rows."""
    missing = max(0, max(rows) + 1 - len(weight))
    changed = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
    changed[list(rows)] = stored.read().reshape(len(rows), -1)
    return changed
