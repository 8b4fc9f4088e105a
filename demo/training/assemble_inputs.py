"""Assembles the super-resolution model (a diffusers folder) and the inpainting model (a file of CompVis) in float16."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import LDMSuperResolutionPipeline, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file

import train_inpainting
import train_super_resolution
from compvis_names import inpainting_state

UNETS = {"super-resolution": train_super_resolution.UNET, "inpainting": train_inpainting.UNET}
"""Task, which is also the name of its run -> options of its UNet."""


def trained_unet(folder: Path, options: dict[str, Any]) -> UNet2DModel:
    """The UNet with the moving average of a run."""
    unet = UNet2DModel(**options)
    state = torch.load(folder / "state.pt", weights_only=True)
    print(folder, state["step"], "steps")
    unet.load_state_dict(state["average"])
    return unet.eval()


def halved(weights: Path) -> None:
    """Convert a safetensors file to float16."""
    half = {name: tensor.half().contiguous() for name, tensor in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})


def write_super_resolution(unet: UNet2DModel, autoencoder: VQModel, folder: Path) -> None:
    """Write the folder."""
    scheduler = train_super_resolution.SCHEDULER
    pipeline = LDMSuperResolutionPipeline(vqvae=autoencoder, unet=unet, scheduler=scheduler)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for weights in folder.rglob("*.safetensors"):
        halved(weights)


def write_inpainting(unet: UNet2DModel, autoencoder: VQModel, folder: Path) -> None:
    """Write ``model.safetensors`` and ``model.yaml``, which names the sizes as the classes of CompVis do."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in inpainting_state(unet, autoencoder).items()},
        folder / "model.safetensors",
    )
    halved(folder / "model.safetensors")
    betas, sizes, latents = train_inpainting.SCHEDULER.config, unet.config, autoencoder.config
    base, widths = sizes.block_out_channels[0], latents.block_out_channels
    unet_params = {
        "image_size": sizes.sample_size,
        "in_channels": sizes.in_channels,
        "out_channels": sizes.out_channels,
        "model_channels": base,
        "channel_mult": [width // base for width in sizes.block_out_channels],
        "attention_resolutions": [
            2**level for level, kind in enumerate(sizes.down_block_types) if kind.startswith("Attn")
        ],
        "num_res_blocks": sizes.layers_per_block,
        "num_head_channels": sizes.attention_head_dim,
    }
    first_stage = {
        "embed_dim": latents.vq_embed_dim,
        "n_embed": latents.num_vq_embeddings,
        "ddconfig": {
            "z_channels": latents.latent_channels,
            "resolution": latents.sample_size,
            "in_channels": 3,
            "out_ch": 3,
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": latents.layers_per_block,
            "attn_resolutions": [],
            "attn_type": "none",
        },
    }
    params = {
        "linear_start": betas.beta_start,
        "linear_end": betas.beta_end,
        "timesteps": betas.num_train_timesteps,
        "parameterization": "v",
        "image_size": sizes.sample_size,
        "channels": sizes.out_channels,
        "concat_mode": True,
        "unet_config": {"params": unet_params},
        "first_stage_config": {"params": first_stage},
        "cond_stage_config": "__is_first_stage__",
    }
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}, sort_keys=False))


WRITERS = {"super-resolution": write_super_resolution, "inpainting": write_inpainting}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=UNETS, help="models to assemble")
    parser.add_argument("--runs", type=Path, default=Path("build/training"), help="the folder of the runs")
    parser.add_argument("--output", type=Path, default=Path("demo/ldm_export_demo"))
    parser.add_argument("--figures", type=Path, default=Path("demo/figures"), help="folder of the loss curves")
    args = parser.parse_args()
    autoencoder = VQModel.from_pretrained(args.runs / "quantized-decoder/model").eval()
    autoencoder.register_to_config(_name_or_path="")
    for task in args.tasks:
        folder = args.output / task.replace("-", "_")
        WRITERS[task](trained_unet(args.runs / task, UNETS[task]), autoencoder, folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        print(folder, sum(path.stat().st_size for path in files), "bytes")
    args.figures.mkdir(parents=True, exist_ok=True)
    for name in ("quantized", "quantized-decoder", *args.tasks):
        if (args.runs / name / "loss.png").exists():
            shutil.copyfile(args.runs / name / "loss.png", args.figures / f"loss-{name}.png")


if __name__ == "__main__":
    main()
