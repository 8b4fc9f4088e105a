"""References for ``verify``: pipelines of diffusers, and a denoising loop in torch for families without one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm_export.checkpoint.diffusers_parts import pixels_per_latent
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.graph import wrappers
from ldm_export.requests import RequestFields
from ldm_runtime.errors import CheckpointError
from ldm_runtime.images import to_pil

__all__ = [
    "Reference",
    "diffusers_pipeline",
    "open_reference",
    "pil_image",
    "reference_latents",
    "sampled",
    "torch_scheduler",
]


def torch_scheduler(checkpoint: Checkpoint) -> Any:
    """The scheduler of a checkpoint, of diffusers.

    Raises:
        CheckpointError: diffusers needs SciPy for the scheduler or its options, and SciPy is not installed.
    """
    config = dict(checkpoint.scheduler_config)
    name = config.pop("class")
    if (name == "LMSDiscreteScheduler" or config.get("use_beta_sigmas")) and find_spec("scipy") is None:
        what = name if name == "LMSDiscreteScheduler" else f"{name} with use_beta_sigmas"
        raise CheckpointError(f"scheduler: diffusers needs SciPy for {what}, to compare with; pip install scipy")
    return checkpoint.layout.scheduler.classes[name](**config)


def diffusers_pipeline(
    pipeline_class: Any, checkpoint: Checkpoint, *, first_stage: str = "vqvae", **others: Any
) -> Any:
    """A checkpoint's pipeline in float32 on the CPU, without a progress bar.

    Args:
        pipeline_class: Of diffusers; takes ``first_stage``, ``unet`` and ``scheduler``.
        checkpoint: With the modules "autoencoder" and "unet".
        first_stage: The class's name of the autoencoder.
        others: Further components that the class takes.
    """
    pipeline = pipeline_class(
        unet=load_module(checkpoint, "unet"),
        scheduler=torch_scheduler(checkpoint),
        **{first_stage: load_module(checkpoint, "autoencoder")},
        **others,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Reference:
    """The modules of a checkpoint without a pipeline of diffusers, float32 on the CPU."""

    encoder: nn.Module
    unet: nn.Module
    decoder: nn.Module
    scheduler: Any


def open_reference(checkpoint: Checkpoint, encoder: nn.Module) -> Reference:
    """Load the modules "unet" and "decoder" of a checkpoint beside the encoder of its conditioning."""
    decoder = wrappers.Decoder(load_module(checkpoint, "decoder"))
    return Reference(encoder, load_module(checkpoint, "unet"), decoder, torch_scheduler(checkpoint))


def reference_latents(
    reference: Reference,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    request: RequestFields,
    generator: torch.Generator,
) -> torch.Tensor:
    """Latents of one request, whose height and width are in pixels; other arguments as of ``sampled``."""
    config: Any = reference.unet.config
    autoencoder: Any = reference.decoder.autoencoder
    sides = (request[side] // pixels_per_latent(autoencoder.config) for side in ("height", "width"))
    return sampled(predict, reference.scheduler, (1, config.out_channels, *sides), request, generator)


def sampled(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: Any,
    shape: tuple[int, ...],
    request: RequestFields,
    generator: torch.Generator,
) -> torch.Tensor:
    """Latents float32 ``shape`` of one request.

    Args:
        predict: Noisy latents and a timestep -> predicted noise, after guidance.
        scheduler: A scheduler of diffusers.
        shape: Of the latents.
        request: With ``num_inference_steps`` and ``eta``.
        generator: Of the initial noise and of each step's.
    """
    scheduler.set_timesteps(request["num_inference_steps"])
    latents: torch.Tensor = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    known = inspect.signature(scheduler.step).parameters
    options = {"eta": request["eta"], "generator": generator}
    options = {name: value for name, value in options.items() if name in known}
    for timestep in scheduler.timesteps:
        noise = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(noise, timestep, latents, **options).prev_sample
    return latents


def pil_image(images: torch.Tensor) -> Image.Image:
    """The first of images float32 [B, channels, H, W] in [0, 1]."""
    return to_pil(images.numpy())[0]
