"""Trains the decoder of the quantized autoencoder on slightly noisy, quantized latents; the rest is frozen."""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import VQModel
from torch import nn

from run import Run, Training
from train_quantized import training_images

BATCH, NOISE, SQUARE_WEIGHT = 8, 0.2, 4.0
"""Batch size, maximum standard deviation of the noise, and weight of the squared error."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("build/training/quantized/model"))
    parser.add_argument("--folder", type=Path, default=Path("build/training/quantized-decoder"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=14)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    autoencoder = VQModel.from_pretrained(args.autoencoder).requires_grad_(False)
    decoder = nn.ModuleList([autoencoder.post_quant_conv, autoencoder.decoder]).requires_grad_(True)
    run = Run(args.folder, decoder, deepcopy(decoder), Training(steps=args.steps, seed=args.seed))

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        images = training_images(args.seed, step, BATCH)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                latents = autoencoder.encode(images).latents.float()
            noise = NOISE * torch.rand((BATCH, 1, 1, 1), generator=generator)
            codes = autoencoder.quantize(latents + noise * torch.randn(latents.shape, generator=generator))[0]
        with torch.autocast("cpu", torch.bfloat16):
            error = autoencoder.decode(codes, force_not_quantize=True).sample.float() - images
        return error.abs().mean() + SQUARE_WEIGHT * error.square().mean()

    run.train(loss_of_step)
    decoder.load_state_dict(run.average.state_dict())
    autoencoder.save_pretrained(args.folder / "model")


if __name__ == "__main__":
    main()
