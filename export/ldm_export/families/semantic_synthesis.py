"""Semantic image synthesis by latent diffusion: CompVis' models of segmentations (Rombach et al. 2022, section 4.3.2).

diffusers has no pipeline for these models; checkpoints are those of CompVis/latent-diffusion. The class of every pixel
is averaged down to the size of the latents, mapped to a few channels, and concatenated to the noisy latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import avg_pool2d

from ldm_export.checkpoint import diffusers_parts as parts
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.layout import ModuleSource, Part
from ldm_export.checkpoint.modules import load_module
from ldm_export.families.activation_memory import activation_memory
from ldm_export.families.family import Family, TracedComponent
from ldm_export.families.reference import Reference, open_reference, pil_image, reference_latents
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import TIME_EMBEDDING
from ldm_export.graph.model_specs import IMAGES, conditioned, decoder_spec, latent_axes, unet_spec
from ldm_export.requests import RequestFields, segmentation_requests
from ldm_runtime.conditioning.segmentation import class_array
from ldm_runtime.model import DECODER, UNET, ConditioningSpec, Defaults, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import ComponentSpec, TensorSpec

__all__ = ["SEMANTIC_SYNTHESIS", "SpatialRescaler", "describe"]

ENCODER, CLASS_MAP = "segmentation_encoder", "class_map"
DEFAULTS = Defaults(num_inference_steps=200, eta=1.0, guidance_scale=1.0)
"""Sampling options of the authors' notebook and of their logging during training."""


class SpatialRescaler(nn.Module):
    """segmentation int64 [B, H, W] -> float32 [B, channels, H / factor, W / factor].

    The authors downsample one-hot images bilinearly by 2, which averages 2 x 2 pixels, until they have the size of the
    latents, and then map classes to channels by a 1x1 convolution. Both operations are linear, so classes are mapped
    first here, which needs ``channels`` instead of ``num_classes`` values per pixel.

    Args:
        num_classes: Number of classes.
        channels: Number of channels for the UNet.
        factor: Pixels per latent, a power of two.
    """

    def __init__(self, num_classes: int = 182, channels: int = 3, factor: int = 4):
        super().__init__()
        self.channel_mapper = nn.Conv2d(num_classes, channels, 1, bias=False)
        self.halvings = factor.bit_length() - 1

    def forward(self, segmentation: torch.Tensor) -> torch.Tensor:
        """Compute the output of the class's docstring."""
        channels = self.channel_mapper.weight[:, :, 0, 0]
        mapped = nn.functional.embedding(segmentation, channels.t()).permute(0, 3, 1, 2)
        for _ in range(self.halvings):
            mapped = avg_pool2d(mapped, 2)
        return mapped


CLASSES = Part(folders=(ENCODER,), classes={"SpatialRescaler": SpatialRescaler})


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other: the UNet must take the latents and the encoder's channels."""
    unet, autoencoder, encoder = configs["unet"], configs["autoencoder"], configs[ENCODER]
    problems = parts.latent_problems({**unet, "in_channels": unet["out_channels"]}, autoencoder)
    if unet["in_channels"] != unet["out_channels"] + encoder["channels"]:
        extra = unet["in_channels"] - unet["out_channels"]
        problems.append(f"the unet takes {extra} channels beside the latents, the encoder gives {encoder['channels']}")
    if encoder["factor"] != parts.pixels_per_latent(autoencoder):
        problems.append(f"the encoder divides sizes by {encoder['factor']}, the autoencoder by another factor")
    return problems


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe the model of a checkpoint; "unet" takes ``sample``, ``timestep`` and ``class_map``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
    """
    configs = checkpoint.configs()
    unet, autoencoder, classes = configs["unet"], configs["autoencoder"], configs[ENCODER]
    latents = parts.latents_of(autoencoder)
    sides = latent_axes(unet["sample_size"])
    pixels, class_map = tuple(side * latents.factor for side in sides), (classes["channels"], *sides)
    encoder = ComponentSpec(
        ENCODER,
        (TensorSpec("segmentation", "int64", (IMAGES, *pixels)),),
        (TensorSpec(CLASS_MAP, "float32", (IMAGES, *class_map)),),
        "request",
    )
    settings = {"classes": classes["num_classes"], **activation_memory(unet, autoencoder)}
    return ModelDescription(
        family=SEMANTIC_SYNTHESIS.name,
        components={
            ENCODER: encoder,
            UNET: unet_spec(latents, sides, 0, (conditioned(CLASS_MAP, 0, class_map),)),
            DECODER: decoder_spec(latents, sides, autoencoder["out_channels"]),
        },
        conditioning=(ConditioningSpec("segmentation", ENCODER, {}, (CLASS_MAP,), settings),),
        guidance=(),
        latents=latents,
        scheduler=scheduler_from_config(checkpoint.scheduler_config).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
    )


def _reference(checkpoint: Checkpoint) -> Reference:
    return open_reference(checkpoint, load_module(checkpoint, ENCODER))


def _reference_image(reference: Reference, request: RequestFields, generator: torch.Generator) -> Image.Image:
    """Generate one image by the equations of the paper, with modules of diffusers."""
    with torch.no_grad():
        class_map = reference.encoder(torch.from_numpy(class_array(request["segmentation"])))

        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            noise: torch.Tensor = reference.unet(torch.cat([sample, class_map], 1), timestep)[0]
            return noise

        return pil_image(reference.decoder(reference_latents(reference, predict, request, generator)))


SEMANTIC_SYNTHESIS = Family(
    name="semantic_synthesis",
    pipelines=(),
    layout=parts.layout(
        "semantic synthesis", _problems, parts={ENCODER: CLASSES}, modules={ENCODER: ModuleSource(ENCODER)}
    ),
    components={
        ENCODER: TracedComponent(ENCODER, lambda module: module),
        UNET: TracedComponent("unet", wrappers.ConcatenatedUNet, (TIME_EMBEDDING,)),
        DECODER: TracedComponent("decoder", wrappers.Decoder),
    },
    files={},
    describe=describe,
    quantize=(UNET, DECODER),
    requests=segmentation_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: segmentation_encoder (SpatialRescaler), unet (UNet2DModel) and autoencoder (VQModel or AutoencoderKL)."""
