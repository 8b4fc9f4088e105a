"""A checkpoint's modules as diffusers and this project load them, run on the same inputs; changes to its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from safetensors.torch import load_file
from torch import nn

from ldm_export.checkpoint.modules import load_module
from ldm_export.families import open_checkpoint
from tests.support.checkpoints import write_tensors

FILES = {"bert": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}
FILES["vqvae"] = FILES["unet"]
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def run(module: nn.Module, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if name == "text_encoder":
            return module.model(torch.randint(0, 50, (2, 77), generator=generator))[0]
        if name == "unet":
            context = torch.randn(2, 77, 24, generator=generator)
            return module(LATENTS, torch.tensor([1, 981]), context).sample
        if name == "autoencoder":
            image = torch.rand(2, 3, 64, 64, generator=generator)
            encoded = module.encode(image)
            return encoded.latents if isinstance(module, VQModel) else encoded.latent_dist.mode()
        return module.decode(LATENTS).sample


def theirs(folder: Path, name: str, *, vq: bool = False) -> torch.Tensor:
    place, kind = {
        "text_encoder": ("bert", LDMBertModel),
        "unet": ("unet", UNet2DConditionModel),
    }.get(name, ("vqvae", VQModel if vq else AutoencoderKL))
    return run(kind.from_pretrained(folder / place, dtype=torch.float32).eval(), name)


def ours(folder: Path, name: str) -> torch.Tensor:
    return run(load_module(open_checkpoint(folder), name), name)


def change(folder: Path, component: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of one component's file."""
    file = folder / component / FILES[component]
    state = load_file(file)
    edit(state)
    write_tensors(file, state)
