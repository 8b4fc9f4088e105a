"""Trains the demo model's UNet on latents of the trained autoencoder, with the trained text encoder's embeddings."""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from rich.progress import track

from data import loosen, scene_images
from run import Run, Training
from text import make_tokenizer, token_ids
from train_text import WIDTH

UNET = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (96, 128),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": WIDTH,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
BATCH, SCENES, PROMPT_DROPOUT = 32, 65_536, 0.1
NOISY, NOISY_FROM = 0.4, 600
"""Share of a batch with timesteps of NOISY_FROM or more, where only the prompt determines the layout."""
OVERSHOT, OVERSHOT_FROM = 0.5, 4500
"""Share of a batch, from that step on, whose noisy latents overshoot like those of guided sampling."""


def scaling_factor(mean: torch.Tensor, std: torch.Tensor) -> float:
    """Factor that scales latents to a root mean square of 1."""
    return 1.0 / (mean.square() + std.square()).mean().sqrt().item()


@torch.no_grad()
def encoded_scenes(autoencoder: AutoencoderKL, folder: Path, seed: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Posterior mean and deviation, each float32 [SCENES, 8, 8, 8], and the sentences; cached in ``latents.pt``."""
    sentences, moments = [], []
    file = folder / "latents.pt"
    count = 256
    for index in track(range(SCENES // count), description="encoding"):
        images, some = scene_images(seed, index, count)
        sentences += some
        if not file.exists():
            posterior = autoencoder.encode(images).latent_dist
            moments.append(torch.stack([posterior.mean, posterior.std]))
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(moments, 1), file)
    mean, std = torch.load(file, weights_only=True)
    return mean, std, sentences


def overshoot(level: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Maximum overshoot of guided latents at a timestep, as a share of their distance to the mean.

    Measured with guidance scale 6: 1.0 times that distance at timestep 880, 0.5 at 480, 0.26 at 80. Near timestep 0 it
    is limited, because the prediction target would grow without bound.

    Args:
        level: alpha_bar at ``timestep``; both [B].
    """
    return torch.minimum(0.2 + 0.9 * timestep / 1000, 2 * ((1 - level) / level).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("build/training/autoencoder/model"))
    parser.add_argument("--text", type=Path, default=Path("build/training/text/model"))
    parser.add_argument("--folder", type=Path, default=Path("build/training/diffusion"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0 for its default")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    autoencoder = AutoencoderKL.from_pretrained(args.autoencoder).eval()
    tokenizer = make_tokenizer(args.folder / "tokenizer")
    mean, std, sentences = encoded_scenes(autoencoder, args.folder, args.seed)
    text_encoder = LDMBertModel.from_pretrained(args.text).eval()
    scale, model = scaling_factor(mean, std), UNet2DConditionModel(**UNET)
    run = Run(args.folder, model, deepcopy(model), Training(steps=args.steps, seed=args.seed, lr=8e-4, decay=0.999))
    alpha_bar, middle = DDIMScheduler(**SCHEDULER).alphas_cumprod, scale * mean.mean(0)

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([args.seed, step, 7])
        rows = rng.integers(SCENES, size=BATCH)
        dropped = rng.random(BATCH) < PROMPT_DROPOUT
        prompts = ["" if drop else str(loosen(sentences[row], rng)) for row, drop in zip(rows, dropped, strict=True)]
        latents = scale * (mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        lowest = np.where(rng.random(BATCH) < NOISY, NOISY_FROM, 0)
        timestep = torch.from_numpy(rng.integers(lowest, 1000))
        level = alpha_bar[timestep]
        beyond = torch.from_numpy(rng.random(BATCH) * (rng.random(BATCH) < OVERSHOT)) * overshoot(level, timestep)
        beyond = (beyond * (step >= OVERSHOT_FROM)).float()[:, None, None, None]
        sqrt_alpha, sqrt_beta = level.sqrt()[:, None, None, None], (1 - level).sqrt()[:, None, None, None]
        noisy = sqrt_alpha * (latents + beyond * (latents - middle)) + sqrt_beta * noise
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                context = text_encoder(token_ids(tokenizer, prompts))[0]
            predicted = model(noisy, timestep, context).sample.float()
        # arXiv 2202.00512; for the true latents, not the overshot ones
        velocity = (sqrt_alpha * noisy - latents) / sqrt_beta
        return (predicted - velocity).square().mean()

    run.train(loss_of_step)


if __name__ == "__main__":
    main()
