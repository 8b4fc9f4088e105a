"""State dicts under the names of CompVis/latent-diffusion, from modules of diffusers and transformers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

State = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_state(unet: nn.Module, blocks: int, heads: Any = None) -> State:
    """A UNet's tensors under CompVis' names; ``heads`` of a width, for fused queries, keys and values."""
    state: State = {}
    tensors = unet.state_dict()
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if stem in ENDS:
            state[f"{ENDS[stem]}.{leaf}"] = tensor
            continue
        side, *rest = stem.split(".")
        if side == "mid_block":
            place = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}[".".join(rest[:2])]
            prefix, inside = f"middle_block.{place}", rest[2:]
        else:
            level, kind, layer, *inside = rest
            index, layer = int(level) * (blocks + 1), int(layer)
            attended = any(key.startswith(f"{side}.{level}.attentions.") for key in tensors)
            down = side == "down_blocks"
            where = {
                "resnets": f"{index + layer + down}.0",
                "attentions": f"{index + layer + down}.1",
                "downsamplers": f"{index + blocks + 1}.0",
                "upsamplers": f"{index + blocks}.{1 + attended}",
            }[kind]
            prefix = f"{'input' if down else 'output'}_blocks.{where}"
            if kind == "downsamplers" and inside == ["conv"]:
                inside = ["op"]
        inner = RESNET.get(".".join(inside), ".".join(inside))
        state[f"{prefix}.{inner}.{leaf}"] = tensor
    return _fused(state, heads) if heads is not None else state


def _fused(state: State, heads: Any) -> State:
    """Queries, keys and values of AttentionBlocks in one tensor, head by head, as 1-D convolutions."""
    fused_state: State = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.+)\.(group_norm|to_q|to_k|to_v|to_out\.0)\.(weight|bias)", name)
        if match is None:
            fused_state[name] = tensor
        elif match[2] == "group_norm":
            fused_state[f"{match[1]}.norm.{match[3]}"] = tensor
        elif match[2] == "to_out.0":
            fused_state[f"{match[1]}.proj_out.{match[3]}"] = tensor[..., None] if tensor.ndim == 2 else tensor
        elif match[2] == "to_q":
            parts = [state[f"{match[1]}.to_{letter}.{match[3]}"] for letter in "qkv"]
            width = len(tensor)
            each = [part.reshape(heads(width), 1, width // heads(width), *tensor.shape[1:]) for part in parts]
            fused = torch.cat(each, 1).reshape(3 * width, *tensor.shape[1:])
            fused_state[f"{match[1]}.qkv.{match[3]}"] = fused[..., None] if fused.ndim == 2 else fused
    return fused_state


def open_clip_state(state: State) -> State:
    """The tensors of CLIPTextModel under OpenCLIP's names."""
    fused: State = {}
    for name, tensor in state.items():
        new = name.replace("embeddings.token_embedding.", "token_embedding.").replace("final_layer_norm.", "ln_final.")
        new = new.replace("embeddings.position_embedding.weight", "positional_embedding")
        new = re.sub(r"^encoder\.layers\.", "transformer.resblocks.", new)
        new = re.sub(r"\.layer_norm([12])\.", r".ln_\1.", new).replace(".self_attn.out_proj.", ".attn.out_proj.")
        new = new.replace(".mlp.fc1.", ".mlp.c_fc.").replace(".mlp.fc2.", ".mlp.c_proj.")
        if (match := re.fullmatch(r"(.+)\.self_attn\.[qkv]_proj\.(weight|bias)", new)) is not None:
            stem = name.rpartition(".self_attn.")[0]
            parts = [state[f"{stem}.self_attn.{letter}_proj.{match[2]}"] for letter in "qkv"]
            new, tensor = f"{match[1]}.attn.in_proj_{match[2]}", torch.cat(parts)
        fused[new] = tensor
    return fused


def autoencoder_state(autoencoder: nn.Module, levels: int) -> State:
    """An autoencoder's tensors under CompVis' names."""
    state = {}
    for name, tensor in autoencoder.state_dict().items():
        new = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
        new = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", new)
        new = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", new)
        new = new.replace(".mid_block.attentions.0.", ".mid.attn_1.")
        new = re.sub(r"(down|up)\.(\d+)\.resnets\.", r"\1.\2.block.", new)
        new = re.sub(r"(down|up)\.(\d+)\.attentions\.", r"\1.\2.attn.", new)
        new = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", new)
        if ".attn" in new:
            new = new.replace(".group_norm.", ".norm.").replace(".to_out.0.", ".proj_out.")
            new = re.sub(r"\.to_([qkv])\.", r".\1.", new)
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        state[new.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")] = tensor
    return state


def bert_state(bert: nn.Module) -> State:
    """A text encoder's tensors under the names of ``BERTEmbedder``."""
    state = {}
    for name, tensor in bert.state_dict().items():
        new = name.removeprefix("model.").replace("embed_tokens", "token_emb").replace("embed_positions", "pos_emb.emb")
        new = re.sub(r"^layer_norm\.", "norm.", new)
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", new)
        if match is not None:
            second = match[2].startswith(("final_layer_norm", "fc"))
            inner = re.sub(r"^(self_attn|final)_layer_norm\.", "0.", match[2])
            inner = re.sub(r"^self_attn\.([qkv])_proj\.", r"1.to_\1.", inner)
            inner = inner.replace("self_attn.out_proj.", "1.to_out.").replace("fc1.", "1.net.0.0.")
            new = f"attn_layers.layers.{2 * int(match[1]) + second}.{inner.replace('fc2.', '1.net.2.')}"
        state[new] = tensor
    return state


def with_schedule(state: State, start: float = 0.0015, end: float = 0.0195) -> State:
    """Add the buffers of the schedule."""
    betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return state | {"betas": betas.float(), "alphas_cumprod": torch.cumprod(1 - betas, 0).float()}


def with_averages(state: State) -> State:
    """Add moving averages of the UNet that differ from its weights."""
    prefix = "model.diffusion_model."
    averages = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": tensor + 1
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    return state | averages | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5)}


def joined(unet: State, autoencoder: State, condition: State, **more: torch.Tensor) -> State:
    """A model's state dict from those of its parts."""
    parts = (("model.diffusion_model.", unet), ("first_stage_model.", autoencoder), ("cond_stage_model.", condition))
    return {f"{prefix}{name}": tensor for prefix, part in parts for name, tensor in part.items()} | more
