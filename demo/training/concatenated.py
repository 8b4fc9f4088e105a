"""What the trainings of the super-resolution and the inpainting UNet share: sizes, encoded images and the loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from rich.progress import track

from run import Run

BATCH, IMAGES, AT_ONCE = 16, 24_576, 256
"""Batch size, number of training images, and number of images that are encoded at once."""
ATTENTION = ("", "Attn", "Attn")
UNET = {
    "sample_size": 16,
    "out_channels": 3,
    "block_out_channels": (64, 64, 64),
    "down_block_types": tuple(f"{kind}DownBlock2D" for kind in ATTENTION),
    "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(ATTENTION)),
    "layers_per_block": 1,
    "attention_head_dim": 32,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
}
"""A UNet of CompVis' latent-diffusion without cross-attention has these options."""

Batch = Callable[[int], dict[str, torch.Tensor]]


def scheduler(betas: tuple[float, float], prediction: str) -> DDIMScheduler:
    """The scheduler of a model with linear_start and linear_end ``betas`` and a prediction_type of diffusers."""
    return DDIMScheduler(
        beta_start=betas[0],
        beta_end=betas[1],
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=prediction,
    )


@torch.no_grad()
def encoded(file: Path, batch: Batch) -> dict[str, torch.Tensor]:
    """Tensors of all training images, from ``batch(index)`` for each group of AT_ONCE images; cached in ``file``."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        parts = [batch(index) for index in track(range(IMAGES // AT_ONCE), description="encoding")]
        torch.save({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, file)
    tensors: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    return tensors


def latents_of(autoencoder: VQModel, images: torch.Tensor) -> torch.Tensor:
    """Latents float32 [B, 3, 16, 16], not quantized, of images float32 [B, 3, 64, 64] in [-1, 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        latents: torch.Tensor = autoencoder.encode(images).latents.float()
    return latents


def train(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    noise_scheduler: DDIMScheduler,
    *,
    steps: int,
    seed: int,
    weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Train the UNet of one model.

    Args:
        folder: Of the run.
        tensors: "latents" float32 [N, 3, 16, 16] to denoise, and "given" float32 [N, K, 16, 16], which is concatenated.
        noise_scheduler: Says how noisy latents are made, and what is predicted.
        steps, seed: As in ``Run``.
        weight: Weight of each latent in the loss, float32 [B, 1, 16, 16], from the given channels and alpha_bar [B].
    """
    torch.manual_seed(seed)
    model = UNet2DModel(in_channels=3 + tensors["given"].shape[1], **UNET)
    run = Run(folder, model, deepcopy(model), steps=steps, lr=1e-3, seed=seed, decay=0.998)
    levels = noise_scheduler.alphas_cumprod
    velocity = noise_scheduler.config.prediction_type == "v_prediction"

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([seed, step])
        rows, timestep = rng.integers(IMAGES, size=BATCH), torch.from_numpy(rng.integers(1000, size=BATCH))
        latents, given = tensors["latents"][rows], tensors["given"][rows]
        noise = torch.randn(latents.shape, generator=generator)
        noisy = noise_scheduler.add_noise(latents, noise, timestep)
        target = noise_scheduler.get_velocity(latents, noise, timestep) if velocity else noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(torch.cat([noisy, given], 1), timestep).sample.float()
        error = (predicted - target).square()
        return error.mean() if weight is None else (weight(given, levels[timestep]) * error).mean()

    run.train(loss_of_step)
