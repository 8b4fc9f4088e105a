"""Trains the shapes text encoder and UNet together on latents of the trained autoencoder."""

from __future__ import annotations

import argparse
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from rich.progress import track
from torch import nn

from data import loosen, pictures
from run import Run
from text import TOKENS, make_tokenizer, vocabulary

WIDTH = 128
BERT = {
    "vocab_size": len(vocabulary()),
    "max_position_embeddings": TOKENS,
    "d_model": WIDTH,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "head_dim": 32,
    "encoder_ffn_dim": 512,
    "dropout": 0.0,
}
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
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
BATCH, SCENES, PROMPT_DROPOUT, MIN_SNR = 64, 65_536, 0.1, 5.0


@dataclass(frozen=True)
class Phase:
    """How batches are drawn from step ``start`` on.

    Where nothing is to be seen yet, in the noisiest timesteps, the prompt alone says what goes where; but there an
    error of the predicted noise that moves the whole picture is small. So later phases draw the share ``noisy`` of a
    batch from timesteps ``noisy_from`` and up and weigh them more, and the share ``single`` from one-object scenes.
    """

    start: int
    noisy: float = 0.0
    noisy_from: int = 0
    single: float = 0.0
    rate: float = 1.0


PHASES = (
    Phase(0),
    Phase(4364, 0.5, 500),
    Phase(5390, 0.75, 800, 0.5, rate=1.75),
    Phase(6307, 0.6, 700, 0.3, rate=1.75),
    Phase(8379, 0.5, 700, 0.1, rate=4.0),
)


def phase_of(step: int) -> Phase:
    """The phase a step belongs to."""
    return [phase for phase in PHASES if phase.start <= step][-1]


def new_model() -> nn.ModuleDict:
    """Text encoder ("bert") and UNet ("unet") with fresh weights."""
    return nn.ModuleDict({"bert": LDMBertModel(LDMBertConfig(**BERT)), "unet": UNet2DConditionModel(**UNET)})


def scaling_factor(mean: torch.Tensor, std: torch.Tensor) -> float:
    """What latents are multiplied by, so that their root mean square is one."""
    return 1.0 / (mean.square() + std.square()).mean().sqrt().item()


@torch.no_grad()
def encoded_scenes(autoencoder: AutoencoderKL, folder: Path, seed: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Posterior mean and deviation, each float32 [SCENES, 4, 8, 8], and the sentences; kept in ``latents.pt``."""
    sentences, moments = [], []
    kept = folder / "latents.pt"
    count = 256
    for index in track(range(SCENES // count), description="encoding"):
        images, some = pictures(seed, index, count)
        sentences += some
        if not kept.exists():
            posterior = autoencoder.encode(images).latent_dist
            moments.append(torch.stack([posterior.mean, posterior.std]))
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(moments, 1), kept)
    mean, std = torch.load(kept, weights_only=True)
    return mean, std, sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--autoencoder", type=Path, default=Path("build/training/autoencoder/model"))
    parser.add_argument("--folder", type=Path, default=Path("build/training/diffusion"))
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 for its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    autoencoder = AutoencoderKL.from_pretrained(args.autoencoder).eval()
    tokenizer = make_tokenizer(args.folder / "tokenizer")
    mean, std, sentences = encoded_scenes(autoencoder, args.folder, args.seed)
    scale, model = scaling_factor(mean, std), new_model()
    average = deepcopy(model)
    singles = np.flatnonzero([len(sentence.things) == 1 for sentence in sentences])
    rate = {"lr": 8e-4, "factor": lambda step: phase_of(step).rate}
    run = Run(args.folder, model, average, steps=args.steps, seed=args.seed, decay=0.999, **rate)
    alpha_bar = DDIMScheduler(**SCHEDULER).alphas_cumprod

    def loss_of_step(step: int, generator: torch.Generator) -> torch.Tensor:
        rng = np.random.default_rng([args.seed, step, 7])
        phase = phase_of(step)
        rows = rng.integers(SCENES, size=BATCH)
        few = int(phase.single * BATCH)
        rows[:few] = rng.choice(singles, few)
        dropped = rng.random(BATCH) < PROMPT_DROPOUT
        prompts = ["" if drop else str(loosen(sentences[row], rng)) for row, drop in zip(rows, dropped, strict=True)]
        ids = tokenizer(
            prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        pair = (mean[rows], std[rows])
        latents = scale * (pair[0] + pair[1] * torch.randn(pair[0].shape, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        timestep = torch.randint(0, 1000, (BATCH,), generator=generator)
        noisy = torch.from_numpy(rng.random(BATCH) < phase.noisy)
        raised = phase.noisy_from + timestep * (1000 - phase.noisy_from) // 1000
        timestep = torch.where(noisy, raised, timestep)
        level = alpha_bar[timestep][:, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            context = model["bert"](ids)[0]
            predicted = model["unet"](
                level.sqrt() * latents + (1 - level).sqrt() * noise, timestep, context
            ).sample.float()
        snr = alpha_bar[timestep] / (1 - alpha_bar[timestep])
        weight = snr.clamp(max=MIN_SNR) / snr  # arXiv 2303.09556
        if phase.noisy:
            weight = torch.maximum(weight, snr.rsqrt())
        return ((predicted - noise).square().mean((1, 2, 3)) * weight).mean()

    run.train(loss_of_step)


if __name__ == "__main__":
    main()
