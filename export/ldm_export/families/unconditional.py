"""Unconditional latent diffusion: diffusers' LDMPipeline (Rombach et al. 2022, arXiv:2112.10752, section 4.1).

A published checkpoint is ``CompVis/ldm-celebahq-256``. There is no conditioning and no guidance. The latents have a
fixed size, because the UNet concatenates skip connections without resizing them, and the pipeline supports no other
size. LDMPipeline divides the latents by the autoencoder's ``scaling_factor``. If a config does not have it, diffusers
uses 0.18215, even for quantized autoencoders whose latents need no scaling. This family does the same, so that its
images are those of the pipeline.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LDMPipeline
from PIL import Image
from torch import nn

from ldm_export.checkpoint import diffusers_parts as parts
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.families.family import Family, TracedComponent
from ldm_export.families.reference import diffusers_pipeline
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import TIME_EMBEDDING
from ldm_export.graph.model_specs import decoder_spec, unet_spec
from ldm_export.requests import RequestFields, plain_requests
from ldm_runtime.model import DECODER, UNET, Defaults, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config

__all__ = ["UNCONDITIONAL", "describe"]

log = logging.getLogger(__name__)

DEFAULTS = Defaults(num_inference_steps=50, eta=0.0, guidance_scale=1.0)
"""Sampling options of LDMPipeline."""


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other, and that the UNet needs no class label."""
    unet = configs["unet"]
    problems = parts.latent_problems(unet, configs["autoencoder"])
    if not isinstance(unet["sample_size"], int):  # LDMPipeline draws square latents of this size
        problems.append(f"sample_size is {unet['sample_size']!r:.80}, expected one number")
    if unet["class_embed_type"] is not None or unet["num_class_embeds"] is not None:
        problems.append("the unet takes a class label, which an unconditional pipeline does not give")
    return problems


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe the model of a checkpoint; "unet" takes ``sample`` and ``timestep``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
    """
    unet, autoencoder = checkpoint.configs()["unet"], checkpoint.components["autoencoder"]
    latents = parts.latents_of(autoencoder.config)
    sides = (unet["sample_size"], unet["sample_size"])
    if "scaling_factor" in autoencoder.defaulted:
        file, factor = autoencoder.folder / parts.AUTOENCODER.config_file, autoencoder.config["scaling_factor"]
        log.warning("%s: has no scaling_factor; latents are divided by %s, as LDMPipeline does", file, factor)
    return ModelDescription(
        family=UNCONDITIONAL.name,
        components={
            UNET: unet_spec(latents, sides, 0),
            DECODER: decoder_spec(latents, sides, autoencoder.config["out_channels"]),
        },
        conditioning=(),
        guidance=(),
        latents=latents,
        scheduler=scheduler_from_config(checkpoint.scheduler_config).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
    )


def _decoder(autoencoder: nn.Module) -> nn.Module:
    return wrappers.Decoder(autoencoder, divide=True)


def _reference(checkpoint: Checkpoint) -> Any:
    return diffusers_pipeline(LDMPipeline, checkpoint)


def _reference_image(pipeline: Any, request: RequestFields, generator: torch.Generator) -> Image.Image:
    steps, eta = request["num_inference_steps"], request["eta"]
    image: Image.Image = pipeline(generator=generator, eta=eta, num_inference_steps=steps).images[0]
    return image


UNCONDITIONAL = Family(
    name="unconditional",
    pipelines=("LDMPipeline", "LatentDiffusionUncondPipeline"),
    layout=parts.layout("unconditional", _problems),
    components={
        UNET: TracedComponent("unet", wrappers.UNet, (TIME_EMBEDDING,)),
        DECODER: TracedComponent("decoder", _decoder),
    },
    files={},
    describe=describe,
    quantize=(UNET, DECODER),
    requests=plain_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: unet (UNet2DModel) and autoencoder (VQModel or AutoencoderKL)."""
