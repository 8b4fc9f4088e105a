"""A small random checkpoint like Stable Diffusion XL, saved by diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.support.clip_vocabulary import END, clip_tokenizer
from tests.support.stable_diffusion import small_autoencoder

__all__ = ["XL_SCHEDULERS", "stable_diffusion_xl_checkpoint"]

PROJECTION, SIZE_CHANNELS = 48, 8
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
XL_SCHEDULERS: dict[str, Any] = {
    "base": EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading", steps_offset=1),
    "turbo": EulerAncestralDiscreteScheduler(**_NOISE, timestep_spacing="trailing"),
    "DDIM": DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
}
"""Schedulers of the published models, and DDIM."""


def _spread(module: nn.Module, factor: float) -> None:
    """Enlarge the weights, without those of norms: at the usual size all prompts would look alike."""
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            parameter.data *= factor


def _text(vocabulary: int, width: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=act,
        projection_dim=PROJECTION,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def _modules(vocabulary: int, depth: int, channels: int) -> dict[str, Any]:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(32, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, depth),
        attention_head_dim=(1, 2),
        cross_attention_dim=64 + 128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_CHANNELS,
        projection_class_embeddings_input_dim=PROJECTION + 6 * SIZE_CHANNELS,
    )
    text = CLIPTextModel(_text(vocabulary, 64, 2, "quick_gelu"))
    text_2 = CLIPTextModelWithProjection(_text(vocabulary, 128, 3, "gelu"))
    for module, factor in ((text, 4), (text_2, 4), (unet.add_embedding, 3)):
        _spread(module, factor)
    modules = {"text_encoder": text, "text_encoder_2": text_2, "unet": unet, "vae": small_autoencoder()}
    return {name: module.eval() for name, module in modules.items()}


def stable_diffusion_xl_checkpoint(
    folder: Path, *, depth: int = 1, variant: str | None = None, inpainting: bool = False
) -> Path:
    """Write a checkpoint; ``depth`` is the number of transformer blocks of each attention.

    The UNet of an ``inpainting`` model takes nine channels.
    """
    tokenizers = [
        CLIPTokenizer.from_pretrained(clip_tokenizer(folder / name, pad_token=pad))
        for name, pad in (("tokenizer", END), ("tokenizer_2", "!"))
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = _modules(len(tokenizers[0]), depth, 9 if inpainting else 4)
    pipeline_class: Any = StableDiffusionXLInpaintPipeline if inpainting else StableDiffusionXLPipeline
    pipeline = pipeline_class(
        **modules,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=XL_SCHEDULERS["base"],
        add_watermarker=False,
    )
    if variant == "fp16":
        for module in modules.values():
            module.half()
    pipeline.save_pretrained(folder, variant=variant)
    return folder
