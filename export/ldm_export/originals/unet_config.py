"""Configs of diffusers' UNet classes from the sizes of a CompVis UNet and its attention heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from ldm_export.checkpoint.layout import Part
from ldm_export.originals.published import Heads
from ldm_export.originals.unet_shape import UNetShape
from ldm_runtime.errors import CheckpointError

__all__ = ["added_config", "unet_class", "unet_config", "unet_part"]


def unet_class(shape: UNetShape) -> str:
    """Diffusers' class for a UNet with or without cross-attention."""
    return "UNet2DModel" if shape.context_width is None else "UNet2DConditionModel"


def unet_config(shape: UNetShape, heads: Heads, sample_size: int) -> dict[str, Any]:
    """Arguments of ``unet_class``.

    Args:
        shape: Sizes of the UNet.
        heads: Its attention heads.
        sample_size: Height and width of the latents.

    Raises:
        CheckpointError: The number of heads does not fit the widths, or diffusers has no such blocks.
    """
    attended = _attended(shape)
    if wrong := [width for width in attended if not heads.divides(width)]:
        option = f"num_heads {heads.number}" if heads.number else f"num_head_channels {heads.channels}"
        raise CheckpointError(
            f"unet: got {option} for an attention of {wrong[0]} channels, expected a divisor of these"
        )
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": shape.in_channels,
        "out_channels": shape.out_channels,
        "block_out_channels": list(shape.widths),
        "layers_per_block": shape.res_blocks,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if shape.scale_shift else "default",
    }
    if shape.context_width is None:
        kinds = ["Attn" if attention else "Resnet" if shape.resblock_updown else "" for attention in shape.attention]
        scaled = {"Attn": ("DownBlock2D", "UpBlock2D"), "": ("DownBlock2D", "UpBlock2D")}
        resnet = ("DownsampleBlock2D", "UpsampleBlock2D")
        sampling = "resnet" if shape.resblock_updown else "conv"
        return config | {
            "down_block_types": [f"{kind}{scaled.get(kind, resnet)[0]}" for kind in kinds],
            "up_block_types": [f"{kind}{scaled.get(kind, resnet)[1]}" for kind in reversed(kinds)],
            "downsample_type": sampling,
            "upsample_type": sampling,
            "attention_head_dim": _one_head_width(shape, heads) or shape.model_channels,
            "attn_norm_num_groups": 32,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "downsample_padding": 1,
        }
    if shape.resblock_updown:
        raise CheckpointError("unet: got cross-attention with resblock_updown, which diffusers has no blocks for")
    kinds = ["CrossAttn" if attention else "" for attention in shape.attention]
    number: Any = heads.number or [max(1, heads.of(width)) for width in shape.widths]
    return config | {
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "cross_attention_dim": shape.context_width,
        "transformer_layers_per_block": shape.depth if isinstance(shape.depth, int) else list(shape.depth),
        "attention_head_dim": number,
        "use_linear_projection": shape.linear,
    }


def added_config(shape: UNetShape, pooled: int) -> dict[str, Any]:
    """Arguments for the added embedding of Stable Diffusion XL, from ``pooled`` channels and six sizes."""
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": ((shape.added_width or 0) - pooled) // 6,
        "projection_class_embeddings_input_dim": shape.added_width,
    }


def unet_part(part: Part, shape: UNetShape, heads: Heads) -> Part:
    """Return the part that creates the UNet. UNet2DModel's config cannot express one number of heads for all widths."""
    if shape.context_width is not None or _one_head_width(shape, heads) is not None:
        return part

    def construct(config: Mapping[str, Any]) -> nn.Module:
        constructor: Any = UNet2DModel
        unet: nn.Module = constructor(**config)
        for module in unet.modules():
            if isinstance(module, Attention):
                width = module.to_q.in_features
                module.heads = heads.of(width)
                module.scale = (width / module.heads) ** -0.5
        return unet

    return replace(part, construct=construct)


def _attended(shape: UNetShape) -> list[int]:
    """Widths of the levels with attention and of the middle block."""
    levels = [width for width, attention in zip(shape.widths, shape.attention, strict=True) if attention]
    return [*levels, shape.widths[-1]]


def _one_head_width(shape: UNetShape, heads: Heads) -> int | None:
    """Channels per head if they are the same for all attentions; else None."""
    widths = {width // heads.of(width) for width in _attended(shape)}
    return widths.pop() if len(widths) == 1 else None
