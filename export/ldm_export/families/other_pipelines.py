"""Descriptions of diffusers pipelines that no family exports, for error messages."""

from __future__ import annotations

__all__ = ["pipeline_kind"]

_KINDS = (
    ("ControlNet", "with a ControlNet"),
    ("StableDiffusionXL", "another pipeline of Stable Diffusion XL"),
    ("StableDiffusion3", "Stable Diffusion 3, a transformer"),
    ("StableDiffusionUpscale", "Stable Diffusion's upscaler, which also takes a low-resolution image"),
    ("StableDiffusionLatentUpscale", "Stable Diffusion's latent upscaler"),
    ("StableDiffusionDepth2Img", "Stable Diffusion with a depth map"),
    ("StableUnCLIP", "Stable Diffusion from image embeddings"),
    ("StableDiffusion", "another pipeline of Stable Diffusion"),
    ("LatentConsistency", "another pipeline of latent consistency models"),
    ("Flux", "FLUX, a transformer"),
    ("PixArt", "PixArt, a transformer"),
    ("DiT", "DiT, a transformer"),
    ("AuraFlow", "AuraFlow, a transformer"),
    ("Sana", "Sana, a transformer"),
    ("QwenImage", "Qwen-Image, a transformer"),
    ("HunyuanDiT", "Hunyuan-DiT, a transformer"),
    ("Kandinsky", "Kandinsky"),
    ("StableCascade", "Stable Cascade"),
    ("Wuerstchen", "Würstchen"),
    ("AnimateDiff", "a model of videos"),
    ("Video", "a model of videos"),
    ("Audio", "a model of sounds"),
    ("DDPM", "diffusion of pixels, not of latents"),
    ("DDIM", "diffusion of pixels, not of latents"),
)
"""(Part of a class name, description of such a pipeline) pairs; the first match is used."""


def pipeline_kind(name: str) -> str | None:
    """Describe a pipeline class of diffusers by a phrase; None if it is not known."""
    return next((kind for part, kind in _KINDS if part in name), None)
