"""Trains the UNet of the inpainting model: latents of an image from those of the image without its masked part."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import VQModel

from concatenated import AT_ONCE, encoded, latents_of, scheduler, train
from data import masked_scenes

FACTOR = 4
SCHEDULER = scheduler((0.0015, 0.008), "epsilon")
"""Less noise at the end than of inpainting_big (0.0205): the first steps multiply errors of predictions by less."""
OUTSIDE, MOST = 0.25, 20.0
"""Weight of latents outside of the mask, where the result is the given image, and maximum weight of a timestep."""


def weight(given: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Weights of the errors of the predicted noise, float32 [B, 1, 16, 16].

    A timestep counts as with velocity prediction: 1 / alpha_bar, at most MOST.

    Args:
        given: Its last channel is the mask.
        level: alpha_bar of each image, [B].
    """
    place = torch.where(given[:, -1:] > 0, 1.0, OUTSIDE)
    return place * (1 / level).clamp(max=MOST)[:, None, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("build/training/quantized/model"))
    parser.add_argument("--folder", type=Path, default=Path("build/training/inpainting"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=13)
    args = parser.parse_args()
    autoencoder = VQModel.from_pretrained(args.autoencoder).eval()

    def batch(index: int) -> dict[str, torch.Tensor]:
        images, masks = masked_scenes(args.seed, index, AT_ONCE)
        masked = latents_of(autoencoder, (1 - masks) * (images + 1) - 1)
        given = torch.cat([masked, masks[:, :, ::FACTOR, ::FACTOR] * 2 - 1], 1)
        return {"latents": latents_of(autoencoder, images), "given": given}

    tensors = encoded(args.folder / "latents.pt", batch)
    train(args.folder, tensors, SCHEDULER, steps=args.steps, seed=args.seed, weight=weight)


if __name__ == "__main__":
    main()
