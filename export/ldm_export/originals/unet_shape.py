"""Sizes of a CompVis UNet, from the names and shapes of its tensors (``openaimodel.UNetModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ldm_export.checkpoint.weights import StoredTensor
from ldm_runtime.errors import CheckpointError

__all__ = ["UNET_PREFIX", "UNetShape", "shape_of", "unet_shape"]

UNET_PREFIX = "model.diffusion_model."

Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class UNetShape:
    """Sizes of a UNet, derived from its state dict. The number of heads is missing, because no shape depends on it.

    Attributes:
        in_channels, out_channels: Channels of the noisy latents and everything concatenated to them, and of the
            prediction.
        model_channels: Base width.
        widths: Channels of each level.
        res_blocks: Number of residual blocks in each level of the down path.
        attention: For each level, whether it has attention.
        context_width: Channels of the cross-attention's context; None without cross-attention.
        depth: Number of transformer blocks per attention, 1 without cross-attention; one number, or one for each level.
        resblock_updown: True if levels are connected by residual blocks instead of convolutions.
        scale_shift: True if the timestep embedding scales and shifts instead of being added.
        linear: True if linear layers instead of 1x1 convolutions surround the transformer blocks.
        added_width: Channels of the added conditioning, which is embedded and added to the timestep embedding; None
            without it.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    widths: tuple[int, ...]
    res_blocks: int
    attention: tuple[bool, ...]
    context_width: int | None
    depth: int | tuple[int, ...]
    resblock_updown: bool
    scale_shift: bool
    linear: bool = False
    added_width: int | None = None

    @property
    def multiples(self) -> tuple[int, ...]:
        """Channels of each level as multiples of the base width."""
        return tuple(width // self.model_channels for width in self.widths)

    @property
    def attention_resolutions(self) -> tuple[int, ...]:
        """Return the downsampling factors of the levels with attention, as a yaml lists them."""
        return tuple(2**level for level, attended in enumerate(self.attention) if attended)


def shape_of(tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    """Return the shape of a tensor that every model of this kind has.

    Raises:
        CheckpointError: It is missing or has another rank.
    """
    if name not in tensors:
        raise CheckpointError(f"checkpoint: tensor {name} is missing, expected a CompVis latent diffusion model")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"checkpoint: tensor {name}: got shape {list(shape)}, expected {rank} axes; use another")
    return shape


def count(tensors: Tensors, pattern: str) -> int:
    """Count consecutive indices i from 0 for which the name of a tensor begins with ``pattern.format(i)``."""
    before, _, _ = pattern.partition("{}")
    indices = {name[len(before) :].partition(".")[0] for name in tensors if name.startswith(before)}
    number = 0
    while str(number) in indices:
        number += 1
    return number


def unet_shape(tensors: Tensors) -> UNetShape:
    """Derive the sizes of the UNet in a state dict.

    Raises:
        CheckpointError: There is no such UNet, or its blocks have an unknown form.
    """
    prefix = UNET_PREFIX
    conv_in = shape_of(tensors, f"{prefix}input_blocks.0.0.weight", 4)
    out = shape_of(tensors, f"{prefix}out.2.weight", 4)
    down, up = count(tensors, f"{prefix}input_blocks.{{}}"), count(tensors, f"{prefix}output_blocks.{{}}")
    per_level = next((index + 1 for index in range(up) if _upsamples(tensors, index)), up)
    if down != up or not per_level or down % per_level or per_level < 2:
        raise CheckpointError(
            f"checkpoint: {prefix}: got {down} input and {up} output blocks, the first upsampling after {per_level}, "
            "expected equal levels; use a CompVis latent diffusion model"
        )
    starts = [1 + level * per_level for level in range(down // per_level)]
    widths = tuple(shape_of(tensors, f"{prefix}input_blocks.{i}.0.out_layers.3.weight", 4)[0] for i in starts)
    attention = tuple(f"{prefix}input_blocks.{i}.1.norm.weight" in tensors for i in starts)
    middle = f"{prefix}middle_block.1."
    cross = f"{middle}transformer_blocks.0.attn2.to_k.weight"
    embedding = shape_of(tensors, f"{prefix}input_blocks.1.0.emb_layers.1.weight", 2)[0]
    if cross in tensors and f"{middle}proj_in.weight" not in tensors:
        raise CheckpointError(f"checkpoint: tensor {middle}proj_in.weight is missing; download the file again")
    if any(width % conv_in[0] for width in widths):
        raise CheckpointError(f"checkpoint: {prefix}: got widths {list(widths)}, expected multiples of {conv_in[0]}")
    return UNetShape(
        in_channels=conv_in[1],
        out_channels=out[0],
        model_channels=conv_in[0],
        widths=widths,
        res_blocks=per_level - 1,
        attention=attention,
        context_width=shape_of(tensors, cross, 2)[1] if cross in tensors else None,
        depth=_depth(tensors, starts) if cross in tensors else 1,
        resblock_updown=f"{prefix}input_blocks.{per_level}.0.in_layers.0.weight" in tensors,
        scale_shift=embedding == 2 * widths[0],
        linear=cross in tensors and len(tensors[f"{middle}proj_in.weight"].shape) == 2,
        added_width=shape_of(tensors, added, 2)[1] if (added := f"{prefix}label_emb.0.0.weight") in tensors else None,
    )


def _depth(tensors: Tensors, starts: list[int]) -> int | tuple[int, ...]:
    """Transformer blocks per attention, by level if they differ; the middle block has as many as the last level."""
    blocks = [f"input_blocks.{start}.1." for start in starts[:-1]] + ["middle_block.1."]
    depths = [count(tensors, f"{UNET_PREFIX}{block}transformer_blocks.{{}}") for block in blocks]
    return depths[-1] if {*depths} <= {0, depths[-1]} else tuple(max(1, depth) for depth in depths)


def _upsamples(tensors: Tensors, index: int) -> bool:
    """True if an output block ends with an upsampling convolution or an upsampling residual block."""
    block = f"{UNET_PREFIX}output_blocks.{index}."
    return any(f"{block}{place}.{name}.weight" in tensors for place in (1, 2) for name in ("conv", "in_layers.2"))
