"""Trains the demo model's autoencoder: AutoencoderKL, factor 8, eight latent channels."""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from data import crowded_images, scene_images
from run import Run, Training

CONFIG = {
    "block_out_channels": (16, 32, 64, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 16,
    "sample_size": 64,
}
BATCH, KL_WEIGHT = 16, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/training/autoencoder"))
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = AutoencoderKL(**CONFIG)
    run = Run(args.folder, model, deepcopy(model), Training(steps=args.steps, seed=args.seed, lr=1.5e-3))

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        images = torch.cat(
            [scene_images(args.seed, step, BATCH // 4)[0], crowded_images(args.seed, step, BATCH - BATCH // 4)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(images).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            latents = mean + std * torch.randn(mean.shape, generator=generator)
            decoded = model.decode(latents).sample.float()
        error = decoded - images
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * kl

    run.train(loss_of_step)
    run.average.save_pretrained(args.folder / "model")


if __name__ == "__main__":
    main()
