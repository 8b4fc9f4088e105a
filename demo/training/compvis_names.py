"""Tensors of UNet2DModel and VQModel under the names of CompVis, the format of the inpainting model."""

from __future__ import annotations

import re

import torch
from diffusers import UNet2DModel, VQModel

State = dict[str, torch.Tensor]

_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
    "conv": "op",
    "group_norm": "norm",
    "to_out.0": "proj_out",
}
_AUTOENCODER = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.(down|up)_blocks\.(\d+)\.", r".\1.\2."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)


def inpainting_state(unet: UNet2DModel, autoencoder: VQModel) -> State:
    """The state dict of a model with this UNet and this autoencoder, which has no attention."""
    return {f"model.diffusion_model.{name}": tensor for name, tensor in _unet_state(unet).items()} | {
        f"first_stage_model.{name}": tensor for name, tensor in _autoencoder_state(autoencoder).items()
    }


def _unet_state(unet: UNet2DModel) -> State:
    """Each level has layers_per_block blocks on the way down, one more on the way up, and a change of size."""
    state, tensors, per_level = {}, unet.state_dict(), unet.config.layers_per_block + 1
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if stem in _ENDS:
            state[f"{_ENDS[stem]}.{leaf}"] = tensor
            continue
        side, *rest = stem.split(".")
        if side == "mid_block":
            block, inner = f"middle_block.{_MIDDLE['.'.join(rest[:2])]}", rest[2:]
        else:
            level, kind, layer, *inner = rest
            down, attended = side == "down_blocks", f"{side}.{level}.attentions.0.to_q.weight" in tensors
            position = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 1 + attended}[kind]
            last = kind.endswith("samplers")
            index = int(level) * per_level + (per_level - 1 if last else int(layer)) + (down and not last)
            index += down and last
            block = f"{'input' if down else 'output'}_blocks.{index}.{position}"
            if kind == "upsamplers":
                state[f"{block}.conv.{leaf}"] = tensor
                continue
        inside = ".".join(inner)
        if inside in ("to_k", "to_v"):
            continue
        if inside == "to_q":
            state[f"{block}.qkv.{leaf}"] = _fused(unet, tensors, name)
        else:
            state[f"{block}.{_RESNET[inside]}.{leaf}"] = (
                tensor[..., None] if inside == "to_out.0" and leaf == "weight" else tensor
            )
    return state


def _fused(unet: UNet2DModel, tensors: State, name: str) -> torch.Tensor:
    """Queries, keys and values of one attention, head by head, as a convolution of one dimension."""
    parts = [tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
    heads = len(parts[0]) // unet.config.attention_head_dim
    rows = torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)
    return rows[..., None] if rows.ndim == 2 else rows


def _autoencoder_state(autoencoder: VQModel) -> State:
    """CompVis counts the decoder's levels from the image, diffusers from the latents."""
    last, state = len(autoencoder.config.block_out_channels) - 1, {}
    for name, tensor in autoencoder.state_dict().items():
        new = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{last - int(match[1])}.", name)
        for pattern, replacement in _AUTOENCODER:
            new = re.sub(pattern, replacement, new)
        state[new] = tensor
    return state
