"""Trains the UNet of the super-resolution model: latents of an image from the image at a quarter of its size."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import VQModel
from torch.nn.functional import avg_pool2d

from concatenated import AT_ONCE, encoded, latents_of, scheduler, train, unet_options
from data import scene_images
from ldm_export_demo.inputs import FACTOR
from run import Training

UNET = unet_options(3, (64, 64, 64), (False, True, True))
SCHEDULER = scheduler((0.0015, 0.0155))
"""The betas of bsr_sr."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("build/training/quantized/model"))
    parser.add_argument("--folder", type=Path, default=Path("build/training/super-resolution"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=12)
    args = parser.parse_args()
    autoencoder = VQModel.from_pretrained(args.autoencoder).eval()

    def batch(index: int) -> dict[str, torch.Tensor]:
        images, _ = scene_images(args.seed, index, AT_ONCE)
        small = ((avg_pool2d(images, FACTOR) + 1) * 127.5).round() / 127.5 - 1  # as an image file of 8 bits
        return {"latents": latents_of(autoencoder, images), "given": small}

    train(args.folder, encoded(args.folder / "latents.pt", batch), UNET, SCHEDULER, Training(args.steps, args.seed))


if __name__ == "__main__":
    main()
