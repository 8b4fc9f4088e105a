"""Puts the trained parts together as a diffusers folder in float16, with the loss curves as a picture."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import matplotlib
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline
from safetensors.torch import load_file, save_file

from text import make_tokenizer
from train_diffusion import SCHEDULER, new_model, scaling_factor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PARTS = ("autoencoder", "decoder", "diffusion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("build/training"), help="the folder of the three runs")
    parser.add_argument("--output", type=Path, default=Path("export/ldm_export/shapes"))
    args = parser.parse_args()
    folder = args.runs / "diffusion"
    model = new_model()
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["average"])
    autoencoder = AutoencoderKL.from_pretrained(args.runs / "decoder/model")
    mean, std = torch.load(folder / "latents.pt", weights_only=True)
    autoencoder.register_to_config(scaling_factor=scaling_factor(mean, std), _name_or_path="")
    pipeline = LDMTextToImagePipeline(
        vqvae=autoencoder,
        bert=model["bert"],
        tokenizer=make_tokenizer(folder / "tokenizer"),
        unet=model["unet"],
        scheduler=DDIMScheduler(**SCHEDULER),
    )
    pipeline.save_pretrained(args.output, safe_serialization=True)
    shutil.copyfile(folder / "tokenizer/vocab.txt", args.output / "tokenizer/vocab.txt")
    for weights in args.output.rglob("*.safetensors"):
        half = {name: tensor.half().contiguous() for name, tensor in load_file(weights).items()}
        save_file(half, weights, metadata={"format": "pt"})
    draw_losses(args.runs, args.output / "loss.png")
    print(args.output, sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file()), "bytes")


def draw_losses(runs: Path, picture: Path) -> None:
    """Write the loss curves of the three runs side by side."""
    figure, axes = plt.subplots(1, len(PARTS), figsize=(12, 3.2), constrained_layout=True)
    for axis, part in zip(axes, PARTS, strict=True):
        steps, losses = zip(*json.loads((runs / part / "loss.json").read_text()), strict=True)
        axis.semilogy(steps, losses, linewidth=0.8)
        axis.set(title=part, xlabel="step", ylabel="loss")
        axis.grid(alpha=0.3, which="both")
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    main()
