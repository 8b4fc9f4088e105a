"""CLIP text encoders in an original checkpoint: their sizes, and their tensors under the names of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.unet_shape import count, shape_of

__all__ = ["Clip", "ClipPair", "clip_pair", "clip_shape", "clip_tensors"]

HEAD_WIDTH = 64
"""Channels per head of the text encoders of OpenAI's ViT-L/14 and OpenCLIP's ViT-H/14 and ViT-bigG/14."""
_OPENAI, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_XL_OPENAI, _XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_PROJECTION = "text_projection.weight"
_NAMES = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
"""(Name in OpenCLIP, name in transformers) pairs."""


@dataclass(frozen=True)
class Clip:
    """Sizes of a CLIP text encoder, without layers that the model does not use.

    Attributes:
        prefix: Prefix of the names of its tensors.
        vocabulary, tokens, width, layers, feed_forward: Size of the vocabulary, maximum number of tokens, channels,
            number of layers, and channels of the feed-forward networks.
        open_clip: True for OpenCLIP's encoder, False for OpenAI's.
        projection: Channels of the projected pooled state; None if the model does not use it.
    """

    prefix: str
    vocabulary: int
    tokens: int
    width: int
    layers: int
    feed_forward: int
    open_clip: bool
    projection: int | None = None

    def config(self) -> dict[str, Any]:
        """Arguments of transformers' CLIPTextConfig."""
        pooled = {} if self.projection is None else {"projection_dim": self.projection, "eos_token_id": 2}
        return {
            **pooled,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.tokens,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.width // HEAD_WIDTH),
            "intermediate_size": self.feed_forward,
            "hidden_act": "gelu" if self.open_clip else "quick_gelu",
        }


@dataclass(frozen=True)
class ClipPair:
    """The two text encoders of Stable Diffusion XL: OpenAI's, and OpenCLIP's with a pooled state."""

    first: Clip
    second: Clip

    @property
    def width(self) -> int:
        """Channels of the hidden states of both."""
        return self.first.width + self.second.width


def clip_shape(tensors: Mapping[str, StoredTensor]) -> Clip | None:
    """Derive the sizes of the text encoder of Stable Diffusion in a state dict; None without one.

    Stable Diffusion 2 does not use the last layer of OpenCLIP's encoder.

    Raises:
        CheckpointError: A tensor is missing or has another rank.
    """
    clip = _open_clip(tensors, _OPEN_CLIP)
    return _openai(tensors, _OPENAI) if clip is None else replace(clip, layers=max(1, clip.layers - 1))


def clip_pair(tensors: Mapping[str, StoredTensor]) -> ClipPair | None:
    """Derive the sizes of the text encoders of Stable Diffusion XL in a state dict; None without them."""
    first, second = _openai(tensors, _XL_OPENAI), _open_clip(tensors, _XL_OPEN_CLIP)
    if first is None or second is None:
        return None
    projection = shape_of(tensors, f"{_XL_OPEN_CLIP}text_projection", 2)[1]
    return ClipPair(first, replace(second, projection=projection))


def _open_clip(tensors: Mapping[str, StoredTensor], prefix: str) -> Clip | None:
    if f"{prefix}token_embedding.weight" not in tensors:
        return None
    names = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
    return _clip(tensors, prefix, names, "transformer.resblocks.", True)


def _openai(tensors: Mapping[str, StoredTensor], outer: str) -> Clip | None:
    prefixes = (f"{outer}text_model.", outer)
    found = [one for one in prefixes if f"{one}embeddings.token_embedding.weight" in tensors]
    embeddings = [f"embeddings.{kind}_embedding.weight" for kind in ("token", "position")]
    names = (*embeddings, "encoder.layers.0.mlp.fc1.weight")
    return _clip(tensors, found[0], names, "encoder.layers.", False) if found else None


def _clip(tensors: Mapping[str, StoredTensor], prefix: str, names: Sequence[str], layer: str, open_clip: bool) -> Clip:
    words, positions, feed_forward = (shape_of(tensors, f"{prefix}{name}", 2) for name in names)
    layers = max(1, count(tensors, f"{prefix}{layer}{{}}"))
    return Clip(prefix, words[0], positions[0], words[1], layers, feed_forward[0], open_clip)


def clip_tensors(tensors: Mapping[str, StoredTensor], clip: Clip) -> dict[str, StoredTensor]:
    """Return only the tensors of the text encoder, under the names of transformers.

    Names are those of CLIPTextModel or, with a projection, of CLIPTextModelWithProjection.
    """
    converted: dict[str, StoredTensor] = {}
    for full, stored in tensors.items():
        if not full.startswith(clip.prefix):
            continue
        name = full.removeprefix(clip.prefix)
        if clip.open_clip:
            for pattern, replacement in _NAMES:
                name = re.sub(pattern, replacement, name)
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        if layer is not None and int(layer[1]) >= clip.layers:
            continue
        joined = re.fullmatch(r"(encoder\.layers\.\d+)\.attn\.in_proj_(weight|bias)", name)
        if joined is not None:
            for index, letter in enumerate("qkv"):
                converted[f"{joined[1]}.self_attn.{letter}_proj.{joined[2]}"] = _third(stored, index)
        elif name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
            converted[name] = stored
    if clip.projection is None:
        return converted
    projection = _transposed(tensors[f"{clip.prefix}text_projection"])
    return {**{f"text_model.{name}": stored for name, stored in converted.items()}, _PROJECTION: projection}


def _transposed(stored: StoredTensor) -> StoredTensor:
    load = stored.load
    return replace(stored, shape=stored.shape[::-1], load=lambda: load().T.contiguous())


def _third(stored: StoredTensor, index: int) -> StoredTensor:
    """Return one of the three equal parts of a tensor along its first axis."""
    rows = stored.shape[0] // 3
    load = stored.load
    return replace(
        stored, shape=(rows, *stored.shape[1:]), load=lambda: load()[index * rows : (index + 1) * rows].clone()
    )
