"""Trains the UNet of the inpainting model: latents of an image from those of the image without its masked part."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import VQModel
from torch.nn.functional import max_pool2d

from concatenated import AT_ONCE, IMAGES, encoded, latents_of, scheduler, train, unet_options
from data import masked_scenes
from ldm_export_demo.inputs import FACTOR
from run import Training

UNET = unet_options(4, (64, 128), (False, True))
SCHEDULER = scheduler((0.0015, 0.0155))
"""The betas of bsr_sr: at the end the latents are noise alone, which those of inpainting_big reach too."""
BATCH, HOLD = 32, 0.6
WHOLE_UNTIL = 1500
"""Step from which no mask hides a whole object: what is there is not determined, so the gradients have more noise."""
OUTSIDE = 0.1
"""Weight of latents that are not near the mask, where the result is the given image."""


def weight(given: torch.Tensor) -> torch.Tensor:
    """Weights of the errors, float32 [B, 1, 16, 16], from the given channels, the last of which is the mask."""
    near = max_pool2d(given[:, -1:], 3, stride=1, padding=1)
    return torch.where(near > 0, 1.0, OUTSIDE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("build/training/quantized/model"))
    parser.add_argument("--folder", type=Path, default=Path("build/training/inpainting"))
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--seed", type=int, default=13)
    args = parser.parse_args()
    autoencoder = VQModel.from_pretrained(args.autoencoder).eval()

    def batch(index: int) -> dict[str, torch.Tensor]:
        images, masks, whole = masked_scenes(args.seed, index, AT_ONCE)
        masked = latents_of(autoencoder, (1 - masks) * (images + 1) - 1)
        given = torch.cat([masked, masks[:, :, ::FACTOR, ::FACTOR] * 2 - 1], 1)
        return {"latents": latents_of(autoencoder, images), "given": given, "whole": whole}

    tensors = encoded(args.folder / "latents.pt", batch)
    everything, parts = torch.arange(IMAGES), torch.nonzero(~tensors["whole"])[:, 0]

    def choice(step: int) -> torch.Tensor:
        return everything if step < WHOLE_UNTIL else parts

    training = Training(steps=args.steps, seed=args.seed, batch=BATCH, hold=HOLD)
    train(args.folder, tensors, UNET, SCHEDULER, training, choice=choice, weight=weight)


if __name__ == "__main__":
    main()
