"""diffusers' pipeline with functions in place of its components, as optimum's pipelines wrap their engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from task import Command, latents
from transformers import BertTokenizerFast

Function = Callable[..., torch.Tensor]


class Part:
    """A component of the pipeline: ``function`` computes, ``config`` is that of the original component."""

    def __init__(self, function: Function, config: Any, wrap: Callable[[torch.Tensor], Any]):
        self._function, self.config, self._wrap = function, config, wrap

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Run the component, as the pipeline calls it."""
        return self._wrap(self._function(*inputs, *keywords.values()))

    decode = __call__


def load(checkpoint: Path, name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load the torch module of a component: "bert", "unet" or "vqvae"."""
    kind = {"bert": LDMBertModel, "unet": UNet2DConditionModel, "vqvae": AutoencoderKL}[name]
    module = kind.from_pretrained(checkpoint / name, torch_dtype=dtype)
    return module.eval().requires_grad_(False)


def pipeline(checkpoint: Path, bert: Function, unet: Function, decoder: Function) -> LDMTextToImagePipeline:
    """Return a pipeline of functions: tokens → context; (sample, timestep, context) → noise; latents → image."""
    unet_config, vqvae_config = (
        SimpleNamespace(**kind.load_config(checkpoint / name))
        for kind, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vqvae"))
    )
    if not hasattr(vqvae_config, "scaling_factor"):
        vqvae_config.scaling_factor = 0.18215
    result = LDMTextToImagePipeline(
        vqvae=Part(decoder, vqvae_config, lambda image: SimpleNamespace(sample=image)),
        bert=Part(bert, None, lambda states: (states,)),
        tokenizer=BertTokenizerFast.from_pretrained(checkpoint / "tokenizer"),
        unet=Part(unet, unet_config, lambda noise: SimpleNamespace(sample=noise)),
        scheduler=DDIMScheduler.from_pretrained(checkpoint / "scheduler"),
    )
    result.set_progress_bar_config(disable=True)
    return result


def draw(result: LDMTextToImagePipeline, command: Command) -> list[Any]:
    """Generate PIL images."""
    size = {name: command[name] for name in ("height", "width")}
    return result(
        command["prompts"],
        guidance_scale=command["guidance"],
        eta=0.0,
        num_inference_steps=command["steps"],
        latents=torch.from_numpy(latents(command)),
        **size,
    ).images
