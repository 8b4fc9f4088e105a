"""Small checkpoints as CompVis/latent-diffusion saves them: random modules of diffusers under the authors' names."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
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


@dataclass
class CompVis:
    """A checkpoint: its modules, its state dict, and its yaml."""

    modules: dict[str, nn.Module]
    state: State
    params: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, name: str = "model.ckpt", **options: Any) -> Path:
        """Write the file with what a trainer adds, and the yaml beside it."""
        folder.mkdir(parents=True, exist_ok=True)
        callbacks = {_callback_class(): {"best_model_path": "x"}}
        content = {
            "epoch": 3,
            "state_dict": self.state,
            "callbacks": callbacks,
            "optimizer_states": [{"state": {0: {}}}],
        }
        torch.save(content, folder / name, **options)
        (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": self.params}}))
        return folder / name


def _callback_class() -> type:
    """A class that exists while it is pickled, as the trainer's; reading must not import it."""
    module = ModuleType("absent_lightning")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": "absent_lightning"})  # type: ignore[attr-defined]
    sys.modules["absent_lightning"] = module
    return module.ModelCheckpoint  # type: ignore[no-any-return]


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


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter drawn anew, since some start as zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return module.eval()


def vq(levels: int = 2, attention: bool = False, mid: bool = True) -> VQModel:
    kinds = ["Attn" if attention and level else "" for level in range(levels)]
    return randomized(  # type: ignore[return-value]
        VQModel(
            block_out_channels=(32,) * levels,
            down_block_types=[f"{kind}DownEncoderBlock2D" for kind in kinds],
            up_block_types=[f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
            num_vq_embeddings=16,
            scaling_factor=1.0,
            mid_block_add_attention=mid,
        )
    )


def joined(unet: State, autoencoder: State, condition: State, **more: torch.Tensor) -> State:
    """A model's state dict from those of its parts."""
    parts = (("model.diffusion_model.", unet), ("first_stage_model.", autoencoder), ("cond_stage_model.", condition))
    return {f"{prefix}{name}": tensor for prefix, part in parts for name, tensor in part.items()} | more


def unconditional(*, updown: bool = False, scale_shift: bool = False, heads: int | None = None) -> CompVis:
    """An unconditional model with attention at two levels; ``heads`` per attention, else 16 channels per head."""

    def number(width: int) -> int:
        return heads or width // 16

    sampling, plain = ("resnet", "Resnet") if updown else ("conv", "")
    down, up = ("DownsampleBlock2D", "UpsampleBlock2D") if updown else ("DownBlock2D", "UpBlock2D")
    unet = randomized(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 64, 96),
            layers_per_block=2,
            down_block_types=(f"{plain}{down}", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", f"{plain}{up}"),
            attention_head_dim=16,
            attn_norm_num_groups=32,
            downsample_type=sampling,
            upsample_type=sampling,
            resnet_time_scale_shift="scale_shift" if scale_shift else "default",
            norm_eps=1e-5,
        )
    )
    autoencoder = vq(3, attention=True)
    state = with_schedule(joined(unet_state(unet, 2, number), autoencoder_state(autoencoder, 3), {}))
    attention = {"num_heads": heads} if heads else {"num_head_channels": 16}
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "image_size": 8,
        "unet_config": {
            "params": {
                "model_channels": 32,
                "channel_mult": [1, 2, 3],
                "attention_resolutions": [4, 2],
                "num_res_blocks": 2,
                "resblock_updown": updown,
                "use_scale_shift_norm": scale_shift,
                **attention,
            }
        },
        "first_stage_config": {"params": {"n_embed": 16, "embed_dim": 3}},
    }
    return CompVis({"unet": unet, "autoencoder": autoencoder}, state, params)


def text_to_image(depth: int = 1) -> CompVis:
    """A text-to-image model: KL autoencoder, 8 heads, a text encoder of two layers and 24 words."""
    unet = randomized(
        UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8,
            transformer_layers_per_block=depth,
        )
    )
    autoencoder = randomized(
        AutoencoderKL(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            scaling_factor=0.18215,
        )
    )
    config = LDMBertConfig(
        vocab_size=24, max_position_embeddings=77, encoder_layers=2, d_model=24, encoder_ffn_dim=96, dropout=0.0
    )
    bert = randomized(LDMBertModel(config))
    condition = {f"transformer.{name}": tensor for name, tensor in bert_state(bert).items()}
    state = joined(unet_state(unet, 1), autoencoder_state(autoencoder, 2), condition)
    params = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "image_size": 8,
        "scale_factor": 0.18215,
        "unet_config": {"params": {"model_channels": 32, "num_heads": 8, "context_dim": 24}},
        "first_stage_config": {"params": {"embed_dim": 4}},
        "cond_stage_config": {"params": {"n_embed": 24, "n_layer": 2, "vocab_size": 24}},
    }
    modules = {"unet": unet, "autoencoder": autoencoder, "text_encoder": bert}
    return CompVis(modules, with_schedule(state, 0.00085, 0.012), params)
