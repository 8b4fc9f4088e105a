"""References for ``verify``: diffusers pipelines, and a denoising loop in torch for families without a pipeline."""

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
    """Create diffusers' scheduler of a checkpoint.

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
    """Create a checkpoint's pipeline in float32 on the CPU, without a progress bar.

    Args:
        pipeline_class: Pipeline class of diffusers; takes ``first_stage``, ``unet`` and ``scheduler``.
        checkpoint: A checkpoint with the modules "autoencoder" and "unet".
        first_stage: Name of the class's argument for the autoencoder.
        others: Further components for the class.
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
    """Modules of a checkpoint for which diffusers has no pipeline, float32 on the CPU."""

    encoder: nn.Module
    unet: nn.Module
    decoder: nn.Module
    scheduler: Any


def open_reference(checkpoint: Checkpoint, encoder: nn.Module) -> Reference:
    """Load the modules "unet" and "decoder" of a checkpoint and the encoder of its conditioning."""
    decoder = wrappers.Decoder(load_module(checkpoint, "decoder"))
    return Reference(encoder, load_module(checkpoint, "unet"), decoder, torch_scheduler(checkpoint))


def reference_latents(
    reference: Reference,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    request: RequestFields,
    generator: torch.Generator,
) -> torch.Tensor:
    """Sample the latents of a request, whose height and width are in pixels; other arguments as in ``sampled``."""
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
    """Sample the latents of a request, float32 ``shape``.

    Args:
        predict: Noisy latents and a timestep -> predicted noise, after guidance.
        scheduler: A scheduler of diffusers.
        shape: Shape of the latents.
        request: The request, with ``num_inference_steps`` and ``eta``.
        generator: Generator of the initial noise and of the noise of each step.
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
    """Convert the first of images float32 [B, channels, H, W] in [0, 1] to a PIL image."""
    return to_pil(images.numpy())[0]
