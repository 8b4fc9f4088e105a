"""Assembles the trained parts into a diffusers folder in float16 and copies the loss curves beside the README."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from safetensors.torch import load_file, save_file

from text import make_tokenizer
from train_diffusion import SCHEDULER, UNET, scaling_factor

RUNS = ("autoencoder", "decoder", "text", "diffusion", "finish")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("build/training"), help="the folder of the five runs")
    parser.add_argument("--output", type=Path, default=Path("demo/ldm_export_demo/checkpoint"))
    parser.add_argument("--figures", type=Path, default=Path("demo/figures"), help="folder of the loss curves")
    args = parser.parse_args()
    folder = args.runs / "diffusion"
    unet = UNet2DConditionModel(**UNET)
    unet.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["average"])
    autoencoder = AutoencoderKL.from_pretrained(args.runs / "finish/model")
    mean, std = torch.load(folder / "latents.pt", weights_only=True)
    autoencoder.register_to_config(scaling_factor=scaling_factor(mean, std), _name_or_path="")
    pipeline = LDMTextToImagePipeline(
        vqvae=autoencoder,
        bert=LDMBertModel.from_pretrained(args.runs / "text/model"),
        tokenizer=make_tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULER),
    )
    pipeline.save_pretrained(args.output, safe_serialization=True)
    shutil.copyfile(folder / "tokenizer/vocab.txt", args.output / "tokenizer/vocab.txt")
    for weights in args.output.rglob("*.safetensors"):
        half = {name: tensor.half().contiguous() for name, tensor in load_file(weights).items()}
        save_file(half, weights, metadata={"format": "pt"})
    args.figures.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        shutil.copyfile(args.runs / name / "loss.png", args.figures / f"loss-{name}.png")
    print(args.output, sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file()), "bytes")


if __name__ == "__main__":
    main()
