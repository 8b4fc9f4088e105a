"""Fine-tunes the decoder on latents that the trained UNet has denoised with guidance."""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from rich.progress import track
from torch import nn

from data import crowded_images, scene_images
from run import Run, Training
from text import make_tokenizer, token_ids
from train_diffusion import SCHEDULER, UNET, scaling_factor

BATCH, SQUARE_WEIGHT = 16, 1.0
PAIRS, AT_ONCE = 4096, 64
"""Number of images that are denoised beforehand, and batch size."""
FROM, STRIDE, GUIDANCE, ETA, OVERSHOT = 240, 40, 6.0, 0.3, 0.3
"""Start timestep of denoising (late enough to keep the image, early enough for errors of the UNet), timesteps between
steps, guidance scale, eta, and maximum overshoot of the latents at the start."""


@torch.no_grad()
def denoised_pairs(runs: Path, autoencoder: AutoencoderKL, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unscaled latents float32 [PAIRS, C, 8, 8] after denoising, and the images they should decode to."""
    mean, std = torch.load(runs / "diffusion/latents.pt", weights_only=True)
    scale = scaling_factor(mean, std)
    middle = scale * mean.mean(0)
    unet, tokenizer = UNet2DConditionModel(**UNET).eval(), make_tokenizer(runs / "diffusion/tokenizer")
    unet.load_state_dict(torch.load(runs / "diffusion/state.pt", weights_only=True)["average"])
    text_encoder = LDMBertModel.from_pretrained(runs / "text/model").eval()
    scheduler = DDIMScheduler(**SCHEDULER)
    scheduler.set_timesteps(scheduler.config.num_train_timesteps // STRIDE)
    generator = torch.Generator().manual_seed(seed)
    denoised, originals = [], []
    for index in track(range(PAIRS // AT_ONCE), description="denoising"):
        images, sentences = scene_images(seed, index, AT_ONCE)
        prompts = [""] * AT_ONCE + [str(sentence) for sentence in sentences]
        latents = scale * autoencoder.encode(images).latent_dist.mean
        latents = latents + OVERSHOT * torch.rand((AT_ONCE, 1, 1, 1), generator=generator) * (latents - middle)
        latents = scheduler.add_noise(latents, torch.randn(latents.shape, generator=generator), torch.tensor([FROM]))
        with torch.autocast("cpu", torch.bfloat16):
            context = text_encoder(token_ids(tokenizer, prompts))[0]
            for timestep in scheduler.timesteps[scheduler.timesteps <= FROM]:
                unguided, prompted = unet(torch.cat([latents, latents]), timestep, context).sample.float().chunk(2)
                predicted = unguided + GUIDANCE * (prompted - unguided)
                latents = scheduler.step(predicted, timestep, latents, eta=ETA, generator=generator).prev_sample
        denoised.append(latents / scale)
        originals.append(images)
    return torch.cat(denoised), torch.cat(originals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("build/training"), help="the folder of the other runs")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    autoencoder = AutoencoderKL.from_pretrained(args.runs / "decoder/model").requires_grad_(False)
    inputs, targets = denoised_pairs(args.runs, autoencoder, args.seed)
    decoder = nn.ModuleList([autoencoder.post_quant_conv, autoencoder.decoder]).requires_grad_(True)
    folder = args.runs / "finish"
    run = Run(folder, decoder, deepcopy(decoder), Training(steps=args.steps, seed=args.seed))

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        rows = np.random.default_rng([args.seed, step]).integers(PAIRS, size=BATCH * 3 // 4)
        clean, denoised = rows[: BATCH // 4], rows[BATCH // 4 :]
        truth = torch.cat([crowded_images(args.seed, step, BATCH // 4), targets[clean]])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                posterior = autoencoder.encode(truth).latent_dist
                sampled = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
            latents, images = torch.cat([inputs[denoised], sampled.float()]), torch.cat([targets[denoised], truth])
            error = autoencoder.decode(latents).sample.float() - images
        return error.abs().mean() + SQUARE_WEIGHT * error.square().mean()

    run.train(loss_of_step)
    decoder.load_state_dict(run.average.state_dict())
    autoencoder.save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
