"""CLIP's text encoder in an original checkpoint: its sizes, and its tensors under the names of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.unet_shape import count, shape_of

__all__ = ["Clip", "clip_shape", "clip_tensors"]

HEAD_WIDTH = 64
"""Channels per head of the text encoders of OpenAI's ViT-L/14 and OpenCLIP's ViT-H/14."""
_OPENAI = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
_OPEN_CLIP = "cond_stage_model.model."
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
"""Names of OpenCLIP, and of transformers."""


@dataclass(frozen=True)
class Clip:
    """Sizes of CLIP's text encoder, without the layers that the model does not use.

    Attributes:
        prefix: Of the names of its tensors.
        vocabulary, tokens, width, layers, feed_forward: Words, longest text in tokens, channels, layers, and channels
            of the feed-forward networks.
        open_clip: It is OpenCLIP's, whose last layer Stable Diffusion 2 leaves out, instead of OpenAI's.
    """

    prefix: str
    vocabulary: int
    tokens: int
    width: int
    layers: int
    feed_forward: int
    open_clip: bool

    def config(self) -> dict[str, Any]:
        """Arguments of transformers' CLIPTextConfig."""
        return {
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.tokens,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.width // HEAD_WIDTH),
            "intermediate_size": self.feed_forward,
            "hidden_act": "gelu" if self.open_clip else "quick_gelu",
        }


def clip_shape(tensors: Mapping[str, StoredTensor]) -> Clip | None:
    """Derive the sizes of CLIP's text encoder in a state dict; None without one.

    Raises:
        CheckpointError: A tensor is missing or has another rank.
    """
    if f"{_OPEN_CLIP}token_embedding.weight" in tensors:
        prefix, layer = _OPEN_CLIP, f"{_OPEN_CLIP}transformer.resblocks."
        names = ("token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight")
    else:
        found = [one for one in _OPENAI if f"{one}embeddings.token_embedding.weight" in tensors]
        if not found:
            return None
        prefix, layer = found[0], f"{found[0]}encoder.layers."
        embeddings = [f"embeddings.{kind}_embedding.weight" for kind in ("token", "position")]
        names = (*embeddings, "encoder.layers.0.mlp.fc1.weight")  # type: ignore[assignment]
    words, positions, feed_forward = (shape_of(tensors, f"{prefix}{name}", 2) for name in names)
    open_clip = prefix == _OPEN_CLIP
    layers = count(tensors, f"{layer}{{}}") - open_clip
    return Clip(prefix, words[0], positions[0], words[1], max(1, layers), feed_forward[0], open_clip)


def clip_tensors(tensors: Mapping[str, StoredTensor], clip: Clip) -> dict[str, StoredTensor]:
    """The tensors of the text encoder under the names of transformers' CLIPTextModel, and no others."""
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
    return converted


def _third(stored: StoredTensor, index: int) -> StoredTensor:
    """One of the three equal parts of a tensor along its first axis."""
    rows = stored.shape[0] // 3
    load = stored.load
    return replace(
        stored, shape=(rows, *stored.shape[1:]), load=lambda: load()[index * rows : (index + 1) * rows].clone()
    )
