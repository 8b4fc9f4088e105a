"""Super-resolution by latent diffusion: diffusers' LDMSuperResolutionPipeline (Rombach et al. 2022, section 4.4).

A published checkpoint is ``CompVis/ldm-super-resolution-4x-openimages``. The image to enlarge has the height and width
of the latents and is concatenated to the noisy latents; the decoder enlarges by the autoencoder's factor. The pipeline
does not use the autoencoder's ``scaling_factor``. The model is convolutional, so the bundle also takes images of other
sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LDMSuperResolutionPipeline
from PIL import Image
from torch import nn

from ldm_export.checkpoint import diffusers_parts as parts
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.families.activation_memory import activation_memory
from ldm_export.families.family import Family, TracedComponent
from ldm_export.families.reference import diffusers_pipeline
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import TIME_EMBEDDING
from ldm_export.graph.model_specs import conditioned, decoder_spec, latent_axes, unet_spec
from ldm_export.requests import RequestFields, image_requests
from ldm_runtime.conditioning.image import image_array
from ldm_runtime.model import DECODER, UNET, ConditioningSpec, Defaults, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config

__all__ = ["SUPER_RESOLUTION", "describe"]

LOW_RESOLUTION = "low_resolution"
PIPELINE_MULTIPLE = 32
"""The pipeline rounds the sides of PIL images down to multiples of this."""
LARGEST = 8
"""Largest image to enlarge, relative to the model's default size: 512 pixels for a model of 64, as in the paper."""
DEFAULTS = Defaults(num_inference_steps=100, eta=1.0, guidance_scale=1.0)
"""Sampling options of the authors' example."""


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other: the UNet's input must have the channels of latents and of an image."""
    unet, autoencoder = configs["unet"], configs["autoencoder"]
    channels = unet["in_channels"] - unet["out_channels"]
    problems = parts.latent_problems({**unet, "in_channels": unet["out_channels"]}, autoencoder)
    if channels != autoencoder["in_channels"]:
        problems.append(
            f"the unet takes {channels} channels beside the latents, an image has {autoencoder['in_channels']}"
        )
    return problems


def _decoder(autoencoder: nn.Module) -> nn.Module:
    decoder = wrappers.Decoder(autoencoder)
    decoder.scaling_factor = 1.0
    return decoder


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe the model of a checkpoint; "unet" takes ``sample``, ``timestep`` and ``low_resolution``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
    """
    unet, autoencoder = checkpoint.configs()["unet"], checkpoint.configs()["autoencoder"]
    latents = parts.latents_of(autoencoder)
    sides = latent_axes(unet["sample_size"], LARGEST)
    image = conditioned(LOW_RESOLUTION, 0, (unet["in_channels"] - unet["out_channels"], *sides))
    multiple = PIPELINE_MULTIPLE if unet["sample_size"] % PIPELINE_MULTIPLE == 0 else 1
    settings = {"multiple": multiple, **activation_memory(unet, autoencoder)}
    return ModelDescription(
        family=SUPER_RESOLUTION.name,
        components={
            UNET: unet_spec(latents, sides, 0, (image,)),
            DECODER: decoder_spec(latents, sides, autoencoder["out_channels"]),
        },
        conditioning=(ConditioningSpec("image", "", {}, (LOW_RESOLUTION,), settings),),
        guidance=(),
        latents=latents,
        scheduler=scheduler_from_config(checkpoint.scheduler_config).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
    )


def _reference(checkpoint: Checkpoint) -> Any:
    return diffusers_pipeline(LDMSuperResolutionPipeline, checkpoint)


def _reference_image(pipeline: Any, request: RequestFields, generator: torch.Generator) -> Image.Image:
    image = torch.from_numpy(image_array("image", request["image"])) * 2 - 1
    steps, eta = request["num_inference_steps"], request["eta"]
    result: Image.Image = pipeline(image=image, generator=generator, eta=eta, num_inference_steps=steps).images[0]
    return result


SUPER_RESOLUTION = Family(
    name="super_resolution",
    pipelines=("LDMSuperResolutionPipeline",),
    layout=parts.layout("super-resolution", _problems),
    components={
        UNET: TracedComponent("unet", wrappers.ConcatenatedUNet, (TIME_EMBEDDING,)),
        DECODER: TracedComponent("decoder", _decoder),
    },
    files={},
    describe=describe,
    quantize=(UNET, DECODER),
    requests=image_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: unet (UNet2DModel) and autoencoder (VQModel or AutoencoderKL)."""
