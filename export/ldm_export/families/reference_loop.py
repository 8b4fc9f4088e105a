"""A denoising loop of torch for families without a pipeline in diffusers, as a reference for verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from ldm_export.requests import RequestFields
from ldm_runtime.images import to_pil

__all__ = ["pil_image", "sampled"]


def sampled(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: Any,
    shape: tuple[int, ...],
    request: RequestFields,
    generator: torch.Generator,
) -> torch.Tensor:
    """Latents float32 ``shape`` of one request.

    Args:
        predict: Noisy latents and a timestep -> predicted noise, after guidance.
        scheduler: A scheduler of diffusers.
        shape: Of the latents.
        request: With ``num_inference_steps`` and ``eta``.
        generator: Of the initial noise and of each step's.
    """
    scheduler.set_timesteps(request["num_inference_steps"])
    latents: torch.Tensor = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noise = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(noise, timestep, latents, eta=request["eta"], generator=generator).prev_sample
    return latents


def pil_image(images: torch.Tensor) -> Image.Image:
    """The first of images float32 [B, channels, H, W] in [0, 1]."""
    return to_pil(images.numpy())[0]
