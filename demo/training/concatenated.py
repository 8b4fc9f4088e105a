"""What the trainings of the super-resolution and the inpainting UNet share: sizes, encoded images and the loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel

from run import Run, Training

IMAGES, AT_ONCE = 24_576, 256
"""Number of training images, and number of images that are encoded at once."""

Batch = Callable[[int], dict[str, torch.Tensor]]


def unet_options(given: int, widths: tuple[int, ...], attention: tuple[bool, ...]) -> dict[str, Any]:
    """Options of ``UNet2DModel`` for latents [3, 16, 16], as a UNet of CompVis without cross-attention has them.

    Args:
        given: Number of channels that are concatenated to the latents.
        widths, attention: Channels of each level, and whether it has attention; largest level first.
    """
    kinds = ["Attn" if attended else "" for attended in attention]
    return {
        "sample_size": 16,
        "in_channels": 3 + given,
        "out_channels": 3,
        "block_out_channels": widths,
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "layers_per_block": 1,
        "attention_head_dim": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }


def scheduler(betas: tuple[float, float]) -> DDIMScheduler:
    """The scheduler of a model with linear_start and linear_end ``betas`` and velocity prediction, arXiv 2202.00512."""
    return DDIMScheduler(
        beta_start=betas[0],
        beta_end=betas[1],
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
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
    options: dict[str, Any],
    noise_scheduler: DDIMScheduler,
    training: Training,
    *,
    choice: Callable[[int], torch.Tensor] | None = None,
    weight: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Train the UNet of one model.

    Args:
        folder: Of the run.
        tensors: "latents" float32 [N, 3, 16, 16] to denoise, and "given" float32 [N, K, 16, 16], which is concatenated.
        options: Of ``UNet2DModel``; see ``unet_options``.
        noise_scheduler: Says how noisy latents are made, and what is predicted.
        training: Steps, learning rate, seed and images of a step.
        choice: Rows of the tensors, int64, from which the images of a step are drawn; all if it is None.
        weight: Weight of each latent in the loss, float32 [B, 1, 16, 16], from the given channels.
    """
    torch.manual_seed(training.seed)
    model = UNet2DModel(**options)
    run = Run(folder, model, deepcopy(model), training)

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([training.seed, step])
        rows = torch.arange(IMAGES) if choice is None else choice(step)
        rows = rows[rng.integers(len(rows), size=training.batch)]
        timestep = torch.from_numpy(rng.integers(1000, size=training.batch))
        latents, given = tensors["latents"][rows], tensors["given"][rows]
        noise = torch.randn(latents.shape, generator=generator)
        noisy = noise_scheduler.add_noise(latents, noise, timestep)
        target = noise_scheduler.get_velocity(latents, noise, timestep)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):  # a fifth faster with so few tokens
            predicted = model(torch.cat([noisy, given], 1), timestep).sample.float()
        error = (predicted - target).square()
        return error.mean() if weight is None else (weight(given) * error).mean()

    run.train(loss_of_step)
