"""Small random checkpoints like Stable Diffusion 1.x and 2.x, saved by diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.support.clip_vocabulary import END, clip_tokenizer

__all__ = ["COMMON", "LEVELS", "SCHEDULERS", "small_autoencoder", "stable_diffusion_checkpoint"]

LEVELS = 2  # of the autoencoder
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
COMMON = ("DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler")
"""Schedulers of most checkpoints."""
SCHEDULERS: dict[str, Any] = {
    "DDIMScheduler": DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False),
    "PNDMScheduler": PNDMScheduler(**_NOISE, skip_prk_steps=True, set_alpha_to_one=False),
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler(**_NOISE),
    "DPM-Solver++ SDE, Karras": DPMSolverMultistepScheduler(
        **_NOISE, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    ),
    "EulerDiscreteScheduler": EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading"),
    "EulerAncestralDiscreteScheduler": EulerAncestralDiscreteScheduler(**_NOISE, timestep_spacing="trailing"),
    "HeunDiscreteScheduler": HeunDiscreteScheduler(**_NOISE, use_karras_sigmas=True),
    "UniPCMultistepScheduler": UniPCMultistepScheduler(**_NOISE),
    "DDPMScheduler": DDPMScheduler(**_NOISE, clip_sample=False),
}
_VERSION_2: dict[str, Any] = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
}


def small_autoencoder() -> Any:
    """A random autoencoder. Models of all versions have the same one, so that it is traced once."""
    return AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        latent_channels=4,
        sample_size=16,
    )


def _modules(vocabulary: int, version: int, channels: int, up: str) -> dict[str, Any]:
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act="quick_gelu" if version == 1 else "gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", up),
        layers_per_block=1,
        cross_attention_dim=128,
        **(_VERSION_2 if version == 2 else {"attention_head_dim": 8}),
    )
    vae = small_autoencoder()
    text_encoder = CLIPTextModel(text)
    for name, parameter in text_encoder.named_parameters():
        if "norm" not in name:  # at the usual 0.02 all prompts would look alike
            parameter.data *= 4
    return {"text_encoder": text_encoder.eval(), "unet": unet.eval(), "vae": vae.eval()}


def stable_diffusion_checkpoint(
    folder: Path,
    version: int = 1,
    *,
    variant: str | None = None,
    inpainting: bool = False,
    up: str = "CrossAttnUpBlock2D",
) -> Path:
    """Write a checkpoint; ``version`` 2 has 2.x' kinds of attention, padding and prediction.

    The UNet of an ``inpainting`` model takes nine channels. ``up`` is the kind of its last block; "UpBlock2D", without
    attention, takes less time to trace, but the authors' files have no such model.
    """
    tokenizer = CLIPTokenizer.from_pretrained(
        clip_tokenizer(folder / "tokenizer", pad_token=END if version == 1 else "!")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(version)
        modules = _modules(len(tokenizer), version, 9 if inpainting else 4, up)
    scheduler = SCHEDULERS["PNDMScheduler" if version == 1 else "DDIMScheduler"]
    if version == 2:
        scheduler = DDIMScheduler.from_config(scheduler.config, prediction_type="v_prediction")
    pipeline_class = StableDiffusionInpaintPipeline if inpainting else StableDiffusionPipeline
    pipeline = pipeline_class(
        **modules,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if variant == "fp16":
        for module in modules.values():
            module.half()
    pipeline.save_pretrained(folder, variant=variant)
    if version == 1:  # published with vocab.json and merges.txt alone
        (folder / "tokenizer" / "tokenizer.json").unlink()
    return folder
