"""Sizes of the conditioning encoder of a CompVis model, from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.clip_shape import Clip, ClipPair, clip_pair, clip_shape
from ldm_export.originals.unet_shape import UNetShape, count, shape_of
from ldm_runtime.errors import CheckpointError

__all__ = ["CONDITION_PREFIX", "KINDS", "Classes", "Condition", "Labels", "Text", "condition_shape", "kind_of"]

CONDITION_PREFIX = "cond_stage_model."
HEAD_WIDTH = 64
"""Channels per head of every BERTEmbedder."""
LAYOUT_TOKENS = 92
"""Tokens of layout2img: 30 objects of three tokens, and two for the crop."""
KINDS = (
    "text_to_image",
    "stable_diffusion",
    "stable_diffusion_xl",
    "class_conditional",
    "unconditional",
    "super_resolution",
    "inpainting",
    "semantic_synthesis",
    "layout_to_image",
)
"""Kinds of models, by the names of their families: those of the paper's model zoo, and Stable Diffusion."""
_MAPPER = f"{CONDITION_PREFIX}channel_mapper.weight"


@dataclass(frozen=True)
class Text:
    """Sizes of a ``BERTEmbedder``: vocabulary, maximum number of tokens, width, layers, heads, feed-forward width."""

    vocabulary: int
    tokens: int
    width: int
    layers: int
    heads: int
    feed_forward: int

    def config(self) -> dict[str, Any]:
        """Arguments of diffusers' LDMBertConfig."""
        return {
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.tokens,
            "encoder_layers": self.layers,
            "encoder_ffn_dim": self.feed_forward,
            "encoder_attention_heads": self.heads,
            "head_dim": HEAD_WIDTH,
            "d_model": self.width,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }


@dataclass(frozen=True)
class Labels:
    """Sizes of a ``ClassEmbedder``: number of classes, including an unconditional class if there is one, and width."""

    classes: int
    width: int

    def config(self, unconditional: bool) -> dict[str, Any]:
        """Arguments of the module that embeds labels; ``unconditional`` is True if the last class is unconditional."""
        return {"num_classes": self.classes, "width": self.width, "unconditional": unconditional}


@dataclass(frozen=True)
class Classes:
    """Sizes of a ``SpatialRescaler``: number of classes, and channels that its 1x1 convolution maps them to."""

    classes: int
    channels: int

    def config(self, factor: int) -> dict[str, Any]:
        """Arguments of the module that encodes segmentations; ``factor`` is pixels per latent."""
        return {"num_classes": self.classes, "channels": self.channels, "factor": factor}


Condition = Text | Labels | Classes | Clip | ClipPair


def condition_shape(tensors: Mapping[str, StoredTensor]) -> Condition | None:
    """Derive the sizes of the text, layout, label or segmentation encoder in a state dict; None without one.

    Raises:
        CheckpointError: The encoder has an unknown form.
    """
    prefix = CONDITION_PREFIX
    if f"{prefix}embedding.weight" in tensors:
        return Labels(*shape_of(tensors, f"{prefix}embedding.weight", 2))
    if _MAPPER in tensors:
        return Classes(*shape_of(tensors, _MAPPER, 4)[1::-1])
    text = f"{prefix}transformer."
    if f"{text}token_emb.weight" not in tensors:
        return clip_shape(tensors) or clip_pair(tensors)
    vocabulary, width = shape_of(tensors, f"{text}token_emb.weight", 2)
    inner = shape_of(tensors, f"{text}attn_layers.layers.0.1.to_q.weight", 2)[0]
    layers = count(tensors, f"{text}attn_layers.layers.{{}}")
    if inner % HEAD_WIDTH or layers % 2:
        raise CheckpointError(
            f"checkpoint: {text}: got {layers} sublayers of {inner} channels, expected pairs and multiples of 64"
        )
    return Text(
        vocabulary=vocabulary,
        tokens=shape_of(tensors, f"{text}pos_emb.emb.weight", 2)[0],
        width=width,
        layers=layers // 2,
        heads=inner // HEAD_WIDTH,
        feed_forward=shape_of(tensors, f"{text}attn_layers.layers.1.1.net.0.0.weight", 2)[0],
    )


def kind_of(unet: UNetShape, condition: Condition | None) -> str:
    """Determine the kind of a model, one of ``KINDS``, from its tensors.

    Raises:
        CheckpointError: It is of another kind.
    """
    extra, channels = unet.in_channels - unet.out_channels, unet.out_channels
    if unet.context_width is not None and isinstance(condition, Labels) and not extra:
        return "class_conditional"
    if unet.context_width is not None and isinstance(condition, Text) and not extra:
        return "layout_to_image" if condition.tokens == LAYOUT_TOKENS else "text_to_image"
    if isinstance(condition, Clip) and unet.context_width == condition.width and extra in (0, channels + 1):
        return "stable_diffusion"
    xl = isinstance(condition, ClipPair) and unet.context_width == condition.width and unet.added_width
    if xl and extra in (0, channels + 1):
        return "stable_diffusion_xl"
    if unet.context_width is None and isinstance(condition, Classes) and extra == condition.channels:
        return "semantic_synthesis"
    if unet.context_width is None and condition is None:
        if extra == channels + 1:
            return "inpainting"
        if not extra:
            return "unconditional"
        if extra == channels:
            return "super_resolution"
    hint = f", with a text encoder of {condition.width} channels" if isinstance(condition, Clip | ClipPair) else ""
    got = f"{unet.in_channels} to {channels} channels, context {unet.context_width}{hint}"
    raise CheckpointError(f"checkpoint: got a UNet of {got}, expected one of {', '.join(KINDS)}")
