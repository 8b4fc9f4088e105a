"""Small random checkpoints like Stable Diffusion 1.x and 2.x, saved by diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

__all__ = ["LEVELS", "SCHEDULERS", "WORDS", "clip_tokenizer", "stable_diffusion_checkpoint", "tokenizer_folder"]

WORDS = ("a", "red", "green", "circle", "square", "photo", "café", "and", "the", "don", "ing", "ß", "ñ", "日")
START, END = "<|startoftext|>", "<|endoftext|>"
LEVELS = 2  # of the autoencoder
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS: dict[str, Any] = {
    "DDIMScheduler": DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "PNDMScheduler": PNDMScheduler(**_NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler(**_NOISE, steps_offset=1),
}
_VERSION_2: dict[str, Any] = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
    "dual_cross_attention": False,
}


def tokenizer_folder(folder: Path, *, pad_token: str = END, **config: Any) -> Path:
    """Write vocab.json, merges.txt and configs of a small CLIP tokenizer, like those that are published."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["!", *(letter for letter in letters if letter != "!"), *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        first, *rest = [text for text, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(word)][0]
        for place, letter in enumerate(rest):
            letter = f"{letter}</w>" if place == len(rest) - 1 else letter
            merges.append((first, letter))
            first += letter
    tokens += dict.fromkeys(left + right for left, right in merges)
    vocabulary = {token: index for index, token in enumerate((*tokens, START, END))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in dict.fromkeys(merges))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    settings = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def clip_tokenizer(folder: Path, **config: Any) -> CLIPTokenizer:
    """transformers' tokenizer of ``tokenizer_folder``."""
    return CLIPTokenizer.from_pretrained(tokenizer_folder(folder, **config))


def _modules(vocabulary: int, version: int) -> dict[str, Any]:
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act="quick_gelu" if version == 1 else "gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        norm_num_groups=8,
        **(_VERSION_2 if version == 2 else {"attention_head_dim": 2}),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    text_encoder = CLIPTextModel(text)
    for name, parameter in text_encoder.named_parameters():
        if "norm" not in name:  # at the usual 0.02 all prompts would look alike
            parameter.data *= 8
    return {"text_encoder": text_encoder.eval(), "unet": unet.eval(), "vae": vae.eval()}


def stable_diffusion_checkpoint(folder: Path, version: int = 1, *, variant: str | None = None) -> Path:
    """Write a checkpoint; ``version`` 2 has 2.x' kinds of attention, padding and prediction."""
    tokenizer = clip_tokenizer(folder / "tokenizer", pad_token=END if version == 1 else "!")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(version)
        modules = _modules(len(tokenizer), version)
    scheduler = SCHEDULERS["PNDMScheduler" if version == 1 else "DDIMScheduler"]
    if version == 2:
        scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type="v_prediction")
    pipeline = StableDiffusionPipeline(
        **modules,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16 if variant == "fp16" else torch.float32)
    pipeline.save_pretrained(folder, variant=variant)
    return folder
