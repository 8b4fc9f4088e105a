"""Small checkpoints as CompVis/latent-diffusion saves them: random modules of diffusers under the authors' names."""

from __future__ import annotations

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

from tests.support.compvis_states import (
    State,
    autoencoder_state,
    bert_state,
    joined,
    unet_state,
    with_schedule,
)


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
