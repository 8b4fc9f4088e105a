"""Maps names of CompVis tensors to names in diffusers' modules, and returns the tensors under these names.

Names of autoencoders are not mapped here: the reader of diffusers' checkpoints knows CompVis' names for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.autoencoder_shape import AUTOENCODER_PREFIX
from ldm_export.originals.condition_shape import CONDITION_PREFIX
from ldm_export.originals.published import Heads
from ldm_export.originals.unet_shape import UNET_PREFIX, UNetShape
from ldm_runtime.errors import CheckpointError

__all__ = [
    "autoencoder_tensors",
    "condition_tensors",
    "ema_name",
    "has_ema",
    "text_tensors",
    "unet_name",
    "unet_tensors",
]

Tensors = Mapping[str, StoredTensor]
EMA_PREFIX = "model_ema."
_AUTOENCODER_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.embedding.")
_FIXED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_TEXT = (
    (r"^token_emb\.", "model.embed_tokens."),
    (r"^pos_emb\.emb\.", "model.embed_positions."),
    (r"^norm\.", "model.layer_norm."),
    (r"\.1\.to_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.1\.to_out\.", ".self_attn.out_proj."),
    (r"\.1\.net\.0\.0\.", ".fc1."),
    (r"\.1\.net\.2\.", ".fc2."),
)


def ema_name(name: str) -> str:
    """Name of the moving average of a parameter: ``model_ema.`` and the name after ``model.`` without dots."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def has_ema(tensors: Tensors) -> bool:
    """True if the state dict has moving averages."""
    return any(name.startswith(f"{EMA_PREFIX}diffusion_model") for name in tensors)


def unet_name(name: str, res_blocks: int) -> str:
    """Return the name of a tensor in diffusers' UNet.

    Args:
        name: Name without the prefix of the UNet.
        res_blocks: Number of residual blocks in each level of the down path.

    Returns:
        The new name. The fused ``qkv`` of an AttentionBlock keeps that last part of its name. Unknown names are
            returned unchanged.
    """
    stem, _, leaf = name.rpartition(".")
    if stem in _FIXED:
        return f"{_FIXED[stem]}.{leaf}"
    side, *numbers = stem.split(".")
    if side == "middle_block" and numbers[0] in _MIDDLE:
        return f"mid_block.{_MIDDLE[numbers[0]]}.{_inside('.'.join((*numbers[1:], leaf)))}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    if match is None:
        return name
    index, place, rest = int(match[2]), int(match[3]), match[4]
    down = match[1] == "input"
    level, layer = divmod(index - 1 if down else index, res_blocks + 1)
    block = f"{'down' if down else 'up'}_blocks.{level}."
    if down and layer == res_blocks:
        return f"{block}downsamplers.0.{_inside(rest.replace('op.', 'conv.', 1) if rest.startswith('op.') else rest)}"
    if place == 0:
        return f"{block}resnets.{layer}.{_inside(rest)}"
    if not down and rest.startswith(("conv.", "in_layers.", "out_layers.", "emb_layers.", "skip_connection.")):
        return f"{block}upsamplers.0.{_inside(rest)}"
    return f"{block}attentions.{layer}.{_inside(rest)}"


def _inside(rest: str) -> str:
    stem, _, leaf = rest.rpartition(".")
    return f"{_RESNET.get(stem, stem)}.{leaf}"


def unet_tensors(tensors: Tensors, shape: UNetShape, heads: Heads, ema: bool) -> dict[str, StoredTensor]:
    """Return the UNet's tensors under diffusers' names. Fused queries, keys and values are split when they are read.

    Args:
        tensors: The state dict.
        shape: Sizes of the UNet.
        heads: Attention heads, on which the order of queries, keys and values depends.
        ema: True takes the moving averages.

    Raises:
        CheckpointError: A moving average is missing or has another shape.
    """
    converted: dict[str, StoredTensor] = {}
    for full, plain in tensors.items():
        if not full.startswith(UNET_PREFIX):
            continue
        stored = _average(tensors, full, plain) if ema else plain
        name = unet_name(full.removeprefix(UNET_PREFIX), shape.res_blocks)
        if shape.context_width is None:
            converted |= _attention_block(name, stored, heads)
        else:
            converted[name] = stored
    return converted


def _average(tensors: Tensors, name: str, plain: StoredTensor) -> StoredTensor:
    stored = tensors.get(ema_name(name))
    if stored is None or stored.shape != plain.shape:
        got = "none" if stored is None else f"shape {list(stored.shape)}"
        raise CheckpointError(
            f"{plain.file}: moving average {ema_name(name)}: got {got}, expected {list(plain.shape)}; use the plain "
            "weights (--weights model)"
        )
    return stored


def _attention_block(name: str, stored: StoredTensor, heads: Heads) -> dict[str, StoredTensor]:
    """Convert tensors of an AttentionBlock, whose projections are 1-D convolutions; return others unchanged."""
    match = re.fullmatch(r"(.+\.attentions\.\d+)\.(norm|qkv|proj_out)\.(weight|bias)", name)
    if match is None:
        return {name: stored}
    block, part, leaf = match.groups()
    if part == "norm":
        return {f"{block}.group_norm.{leaf}": stored}
    rows, *columns = stored.shape
    flat = (rows, *columns[:1])
    if part == "proj_out":
        return {f"{block}.to_out.0.{leaf}": _derived(stored, flat, lambda tensor: tensor.reshape(flat))}
    width = rows // 3
    number = heads.of(width)

    def third(index: int) -> StoredTensor:
        split = (3, number, width // number) if heads.new_order else (number, 3, width // number)
        axis = 0 if heads.new_order else 1
        shape = (width, *columns[:1])
        return _derived(
            stored, shape, lambda tensor: tensor.reshape(*split, *columns[:1]).select(axis, index).reshape(shape)
        )

    return {f"{block}.to_{letter}.{leaf}": third(index) for index, letter in enumerate("qkv")}


def _derived(stored: StoredTensor, shape: tuple[int, ...], change: object) -> StoredTensor:
    """Return a tensor that is changed after it is loaded."""
    load = stored.load

    def changed() -> torch.Tensor:
        tensor: torch.Tensor = change(load())  # type: ignore[operator]
        return tensor

    return replace(stored, shape=shape, load=changed)


def autoencoder_tensors(tensors: Tensors) -> dict[str, StoredTensor]:
    """Return the autoencoder's tensors under CompVis' names, without those of its loss."""
    return _below(tensors, AUTOENCODER_PREFIX, _AUTOENCODER_PARTS)


def text_tensors(tensors: Tensors) -> dict[str, StoredTensor]:
    """Return the tensors of a ``BERTEmbedder`` under the names of diffusers' LDMBertModel."""
    converted = {}
    for name, stored in _below(tensors, f"{CONDITION_PREFIX}transformer.", ("",)).items():
        match = re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.+)", name)
        if match is not None:
            layer, second = divmod(int(match[1]), 2)
            norm = "final_layer_norm" if second else "self_attn_layer_norm"
            rest = re.sub(r"^0\.", f"{norm}.", match[2])
            name = f"model.layers.{layer}.{rest}"
        for pattern, replacement in _TEXT:
            name = re.sub(pattern, replacement, name)
        converted[name] = stored
    return converted


def condition_tensors(tensors: Tensors, part: str) -> dict[str, StoredTensor]:
    """Return the tensors of the conditioning encoder below one of its parts, e.g. "embedding."."""
    return _below(tensors, CONDITION_PREFIX, (part,))


def _below(tensors: Tensors, prefix: str, parts: tuple[str, ...]) -> dict[str, StoredTensor]:
    return {
        name.removeprefix(prefix): stored
        for name, stored in tensors.items()
        if name.startswith(prefix) and name.removeprefix(prefix).startswith(parts)
    }
