"""A checkpoint that is configs only, of the smallest model that has every part: it builds in seconds."""

from __future__ import annotations

from pathlib import Path

from tiny import write_json

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
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
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
