"""The smallest models that have every part: a checkpoint that is configs only, and UNets of as many levels as asked."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from tests.support.checkpoints import write_json

CONFIGS = {
    "model_index.json": {
        "_class_name": "LDMTextToImagePipeline",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vqvae": ["diffusers", "AutoencoderKL"],
    },
    "bert/config.json": {
        "vocab_size": 256,
        "max_position_embeddings": 16,
        "encoder_layers": 1,
        "d_model": 16,
        "encoder_attention_heads": 2,
        "head_dim": 8,
        "encoder_ffn_dim": 16,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
    },
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "model_max_length": 77},
    "unet/config.json": {
        "sample_size": 8,
        "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    "vqvae/config.json": {
        "sample_size": 16,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
    },
}


def write_configs(folder: Path) -> Path:
    """Write the configs, no weights and no vocabulary, and give the folder back."""
    for name, content in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, content)
    return folder


def random_unet(levels: int, crossed: int) -> UNet2DConditionModel:
    """A random UNet, ``crossed`` of its levels with attention to the context.

    With four levels, as the published model has, latents of 9×11 shrink to 2×2.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(levels)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 16, 16)[:levels],
            down_block_types=("CrossAttnDownBlock2D",) * crossed + ("DownBlock2D",) * (levels - crossed),
            up_block_types=("UpBlock2D",) * (levels - crossed) + ("CrossAttnUpBlock2D",) * crossed,
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=4,
        ).eval()
