"""Trains the autoencoder that the super-resolution and the inpainting model share: VQModel, factor 4, three channels.

It is trained with noise in place of quantization. Then its latents are scaled to mean 0 and standard deviation 1, and
a codebook is fitted to them.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import VQModel

from data import crowded_images, scene_images
from run import Run, Training

CODES, CHANNELS = 4096, 3
CONFIG = {
    "block_out_channels": (32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "vq_embed_dim": CHANNELS,
    "num_vq_embeddings": CODES,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "mid_block_add_attention": False,
}
"""CompVis' VQModel without attention has these layers, with 32 groups in every normalisation."""
BATCH, NOISE = 8, 0.1
"""Batch size, and standard deviation of the noise as a share of the latents'."""
FITTED, ROUNDS, CELL = 2048, 12, 0.02
"""Images whose latents the codebook is fitted to, rounds of k-means, and cell size below which latents count once."""


def training_images(seed: int, step: int, count: int) -> torch.Tensor:
    """Images float32 [count, 3, 64, 64] in [-1, 1]; one in four has a black rectangle, as masked images do."""
    few, _ = scene_images(seed, step, count // 4)
    images = torch.cat([few, crowded_images(seed, step, count - count // 4)])
    rng = np.random.default_rng([seed, step, 9])
    for image in images:
        if rng.random() < 0.25:
            left, top = rng.integers(0, 48, 2)
            width, height = rng.integers(8, 40, 2)
            image[:, top : top + height, left : left + width] = -1
    return images


def train(folder: Path, steps: int, seed: int) -> VQModel:
    """Train without quantization and return the moving average."""
    model = VQModel(**CONFIG)
    run = Run(folder, model, deepcopy(model), Training(steps=steps, seed=seed, lr=2e-3))

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        images = training_images(seed, step, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encode(images).latents.float()
            noise = NOISE * latents.detach().std((0, 2, 3), keepdim=True)
            latents = latents + noise * torch.randn(latents.shape, generator=generator)
            error = model.decode(latents, force_not_quantize=True).sample.float() - images
        return error.abs().mean() + error.square().mean()

    run.train(loss_of_step)
    return run.average


@torch.no_grad()
def standardise(model: VQModel, seed: int) -> torch.Tensor:
    """Scale the latents to mean 0 and deviation 1 per channel; the decoder undoes it. Return latents float32 [N, 3]."""
    each = [model.encode(training_images(seed, 1_000_000 + index, 64)).latents for index in range(FITTED // 64)]
    latents = torch.cat(each).permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    mean, std = latents.mean(0), latents.std(0)
    before, after = model.quant_conv, model.post_quant_conv
    before.weight /= std[:, None, None, None]
    before.bias.copy_((before.bias - mean) / std)
    after.bias += (after.weight[:, :, 0, 0] @ mean).reshape(after.bias.shape)
    after.weight *= std[None, :, None, None]
    return (latents - mean) / std


@torch.no_grad()
def fit_codebook(model: VQModel, latents: torch.Tensor, seed: int) -> None:
    """Fit the codebook by k-means; of latents that are almost equal, as in flat areas, one counts."""
    distinct = latents[np.unique((latents / CELL).round().numpy(), axis=0, return_index=True)[1]]
    generator = torch.Generator().manual_seed(seed)
    points = distinct[torch.randperm(len(distinct), generator=generator)[:100_000]]
    codes = points[:CODES].clone()
    for _ in range(ROUNDS):
        nearest = torch.cat([torch.cdist(part, codes).argmin(1) for part in points.split(8192)])
        counts = torch.bincount(nearest, minlength=CODES)[:, None]
        sums = torch.zeros_like(codes).index_add_(0, nearest, points)
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    model.quantize.embedding.weight.copy_(codes)
    some = latents[:: len(latents) // 16_384]
    error = (codes[torch.cdist(some, codes).argmin(1)] - some).square().mean().sqrt()
    print(f"{len(points)} distinct latents, root mean square of the quantization error {error:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/training/quantized"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = train(args.folder, args.steps, args.seed).eval()
    fit_codebook(model, standardise(model, args.seed), args.seed)
    model.save_pretrained(args.folder / "model")


if __name__ == "__main__":
    main()
