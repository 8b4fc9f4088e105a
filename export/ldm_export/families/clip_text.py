"""CLIP text encoders, OpenAI's and OpenCLIP's, and their tokenizers, as parts of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldm_export.checkpoint.clip_tokenizer_files import (
    CLIP_FILES,
    clip_length,
    read_clip_tokenizer,
    write_clip_tokenizer_json,
)
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.layout import Part, WeightNames
from ldm_export.checkpoint.placeholder_vocabulary import placeholder_clip_tokenizer
from ldm_export.families.text_to_image import check_token_ids
from ldm_export.graph.model_specs import IMAGES
from ldm_runtime.conditioning.text_encoder import ATTENTION_MASK, INPUT_IDS
from ldm_runtime.specs import TensorSpec

__all__ = [
    "CLIP_PROJECTION",
    "CLIP_TEXT",
    "MAX_CHUNKS",
    "TOKENIZER_FOLDER",
    "ClipProjectionConfig",
    "ClipTextConfig",
    "clip_inputs",
    "clip_tokenizer",
    "clip_tokens",
    "write_clip_tokenizer",
]

TOKENIZER_FOLDER = "the folder tokenizer of a diffusers checkpoint, with vocab.json and merges.txt"
MAX_CHUNKS = 8
"""Maximum number of chunks of a long prompt."""
OPEN_CLIP_PADDING = "!"
"""Padding token of OpenCLIP, which has the id 0."""


@dataclass(frozen=True)
class ClipTextConfig:
    """The options of transformers' CLIPTextConfig that a text encoder's hidden states depend on, with its defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class ClipProjectionConfig(ClipTextConfig):
    """The options of a text encoder, including those that pooled states depend on."""

    projection_dim: int = 512
    eos_token_id: int = 49407


def _transformers_config(config: Mapping[str, Any], **changed: Any) -> CLIPTextConfig:
    options: dict[str, Any] = {**config, "pad_token_id": None, "bos_token_id": None, **changed}
    return CLIPTextConfig(**options)


def _clip_text_model(config: Mapping[str, Any]) -> nn.Module:
    return CLIPTextModel(_transformers_config(config, eos_token_id=2))  # of pooled states, which nothing here reads


CLIP_TEXT = Part(
    folders=("text_encoder",),
    classes={"CLIPTextModel": ClipTextConfig},
    weights=WeightNames(((r"^text_model\.", ""),)),  # the prefix of transformers before 5
    construct=_clip_text_model,
)
"""A text encoder whose hidden states are used."""

CLIP_PROJECTION = Part(
    folders=("text_encoder_2",),
    classes={"CLIPTextModelWithProjection": ClipProjectionConfig},
    construct=lambda config: CLIPTextModelWithProjection(_transformers_config(config)),
)
"""A text encoder whose hidden states and projected pooled states are used."""


def clip_inputs(tokens: int, number: str = "") -> tuple[TensorSpec, TensorSpec]:
    """Specs of a text encoder's inputs: ids and attention mask; ``number`` is the suffix of their names."""
    shape = (IMAGES, tokens)
    return TensorSpec(f"{INPUT_IDS}{number}", "int64", shape), TensorSpec(f"{ATTENTION_MASK}{number}", "int64", shape)


def clip_tokens(checkpoint: Checkpoint, tokenizer: str = "tokenizer", encoder: str = "text_encoder") -> int:
    """Number of tokens of a prompt: that of the tokenizer, or the text encoder's maximum if it is smaller.

    Raises:
        CheckpointError: The tokenizer's config cannot be read.
    """
    positions: int = checkpoint.components[encoder].config["max_position_embeddings"]
    return min(clip_length(checkpoint.files[tokenizer]), positions)


@contextmanager
def _tokenizer_folder(checkpoint: Checkpoint, name: str) -> Iterator[Path]:
    """Yield the folder of the checkpoint's tokenizer; a placeholder for random weights without a vocabulary."""
    source = checkpoint.files[name]
    if checkpoint.random_seed is None or any((source / file).exists() for file in CLIP_FILES):
        yield source
        return
    with TemporaryDirectory() as folder:
        yield placeholder_clip_tokenizer(source, Path(folder))


def write_clip_tokenizer(
    checkpoint: Checkpoint, target: Path, name: str = "tokenizer", encoder: str = "text_encoder"
) -> None:
    """Write a tokenizer of the checkpoint to ``target``, in the form that bundles have.

    Raises:
        CheckpointError: Its files cannot be used, or the text encoder embeds fewer tokens.
    """
    with _tokenizer_folder(checkpoint, name) as folder:
        write_clip_tokenizer_json(folder, target, _padding(checkpoint, name), checkpoint.added_tokens.get(name, ()))
    check_token_ids(checkpoint, target, name, encoder)


def clip_tokenizer(checkpoint: Checkpoint, name: str = "tokenizer", encoder: str = "text_encoder") -> Any:
    """Open a tokenizer of the checkpoint with transformers.

    Raises:
        CheckpointError: Its files cannot be used.
    """
    with _tokenizer_folder(checkpoint, name) as folder:
        tokenizer = read_clip_tokenizer(folder, _padding(checkpoint, name), checkpoint.added_tokens.get(name, ()))
    tokenizer.model_max_length = clip_tokens(checkpoint, name, encoder)
    return tokenizer


def _padding(checkpoint: Checkpoint, name: str) -> str | None:
    """Padding token of a second tokenizer that shares the folder of the first, as in original checkpoint files."""
    return (
        OPEN_CLIP_PADDING if name != "tokenizer" and checkpoint.files[name] == checkpoint.files["tokenizer"] else None
    )
