"""Trains the decoder further on slightly noisy latents, like those of a denoiser; the encoder is frozen."""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from data import crowded_images, scene_images
from run import Run, Training

BATCH, NOISE, SQUARE_WEIGHT = 16, 0.3, 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("build/training/autoencoder/model"))
    parser.add_argument("--folder", type=Path, default=Path("build/training/decoder"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    autoencoder = AutoencoderKL.from_pretrained(args.autoencoder).requires_grad_(False)
    decoder = nn.ModuleList([autoencoder.post_quant_conv, autoencoder.decoder]).requires_grad_(True)
    run = Run(args.folder, decoder, deepcopy(decoder), Training(steps=args.steps, seed=args.seed))

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        few, _ = scene_images(args.seed, step, BATCH * 3 // 4)
        images = torch.cat([few, crowded_images(args.seed, step, BATCH // 4)])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                posterior = autoencoder.encode(images).latent_dist
                mean, std = posterior.mean.float(), posterior.std.float()
            noise_std = torch.rand((BATCH, 1, 1, 1), generator=generator) * NOISE * mean.std((0, 2, 3), keepdim=True)
            latents = mean + (std.square() + noise_std.square()).sqrt() * torch.randn(mean.shape, generator=generator)
            error = autoencoder.decode(latents).sample.float() - images
        return error.abs().mean() + SQUARE_WEIGHT * error.square().mean()

    run.train(loss_of_step)
    decoder.load_state_dict(run.average.state_dict())
    autoencoder.save_pretrained(args.folder / "model")


if __name__ == "__main__":
    main()
