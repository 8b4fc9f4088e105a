"""Inpainting by latent diffusion: CompVis' inpainting_big (Rombach et al. 2022, section 4.5).

diffusers has no pipeline for this model; checkpoints are those of CompVis/latent-diffusion, and the computation is that
of its ``scripts/inpaint.py``. The UNet takes the noisy latents, the latents of the image without its masked part
(neither quantized nor scaled), and the mask. Outside the mask, the result is the given image. The model is
convolutional, so the bundle also takes images of other sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm_export.checkpoint import diffusers_parts as parts
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.families.activation_memory import activation_memory
from ldm_export.families.family import Family, TracedComponent
from ldm_export.families.reference import Reference, open_reference, pil_image, reference_latents
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import TIME_EMBEDDING
from ldm_export.graph.model_specs import IMAGES, conditioned, decoder_spec, latent_axes, unet_spec
from ldm_export.requests import RequestFields, image_requests
from ldm_runtime.conditioning.image import image_array
from ldm_runtime.model import DECODER, UNET, ConditioningSpec, Defaults, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import ComponentSpec, TensorSpec

__all__ = ["INPAINTING", "MaskedImageEncoder", "describe"]

ENCODER, MASKED_IMAGE = "masked_image_encoder", "masked_image"
DEFAULTS = Defaults(num_inference_steps=50, eta=0.0, guidance_scale=1.0)
"""Sampling options of the authors' script."""


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other: the UNet's inputs are two latents and a mask."""
    unet, autoencoder = configs["unet"], configs["autoencoder"]
    problems = parts.latent_problems({**unet, "in_channels": unet["out_channels"]}, autoencoder)
    if not parts.takes_mask(unet):
        problems.append(f"the unet takes {unet['in_channels']} channels, two latents and a mask are others")
    if autoencoder.get("vq_embed_dim") is None:
        problems.append("the autoencoder has no codebook, which an inpainting model's has")
    return problems


class MaskedImageEncoder(nn.Module):
    """Image float32 [B, 3, H, W] in [-1, 1], mask float32 [B, 1, H, W] -> latents and mask float32 [B, C + 1, h, w].

    The masked part (mask 1) is made black before encoding. The mask is sampled at every ``factor``-th pixel and scaled
    to [-1, 1].

    Args:
        autoencoder: A VQModel of diffusers.
    """

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        config: Any = autoencoder.config
        self.autoencoder: Any = autoencoder
        self.factor = parts.pixels_per_latent(config)

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the output of the class's docstring."""
        masked = (1 - mask) * (image + 1) - 1
        latents: torch.Tensor = self.autoencoder.encode(masked, return_dict=False)[0]
        return torch.cat([latents, mask[:, :, :: self.factor, :: self.factor] * 2 - 1], dim=1)


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe the model of a checkpoint; "unet" takes ``sample``, ``timestep`` and ``masked_image``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
    """
    unet, autoencoder = checkpoint.configs()["unet"], checkpoint.configs()["autoencoder"]
    latents = parts.latents_of(autoencoder)
    sides = latent_axes(unet["sample_size"])
    pixels, encoded = tuple(side * latents.factor for side in sides), (latents.channels + 1, *sides)
    encoder = ComponentSpec(
        ENCODER,
        (
            TensorSpec("image", "float32", (IMAGES, autoencoder["in_channels"], *pixels)),
            TensorSpec("mask", "float32", (IMAGES, 1, *pixels)),
        ),
        (TensorSpec(MASKED_IMAGE, "float32", (IMAGES, *encoded)),),
        "request",
    )
    return ModelDescription(
        family=INPAINTING.name,
        components={
            ENCODER: encoder,
            UNET: unet_spec(latents, sides, 0, (conditioned(MASKED_IMAGE, 0, encoded),)),
            DECODER: decoder_spec(latents, sides, autoencoder["out_channels"]),
        },
        conditioning=(
            ConditioningSpec("masked_image", ENCODER, {}, (MASKED_IMAGE,), activation_memory(unet, autoencoder)),
        ),
        guidance=(),
        latents=latents,
        scheduler=scheduler_from_config(checkpoint.scheduler_config).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
    )


def _reference(checkpoint: Checkpoint) -> Reference:
    return open_reference(checkpoint, MaskedImageEncoder(load_module(checkpoint, "encoder")))


def _reference_image(reference: Reference, request: RequestFields, generator: torch.Generator) -> Image.Image:
    """Generate one image as the authors' script does, with modules of diffusers."""
    image, mask = (torch.from_numpy(image_array(name, request[name])) for name in ("image", "mask"))
    with torch.no_grad():
        masked = reference.encoder(image * 2 - 1, mask)

        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            noise: torch.Tensor = reference.unet(torch.cat([sample, masked], 1), timestep)[0]
            return noise

        decoded = reference.decoder(reference_latents(reference, predict, request, generator))
        return pil_image((1 - mask) * image + mask * decoded)


INPAINTING = Family(
    name="inpainting",
    pipelines=(),
    layout=parts.layout(
        "inpainting",
        _problems,
        modules={"encoder": parts.ENCODER_MODULE},
    ),
    components={
        ENCODER: TracedComponent("encoder", MaskedImageEncoder),
        UNET: TracedComponent("unet", wrappers.ConcatenatedUNet, (TIME_EMBEDDING,)),
        DECODER: TracedComponent("decoder", wrappers.Decoder),
    },
    files={},
    describe=describe,
    quantize=(UNET, DECODER),
    requests=image_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: unet (UNet2DModel) and autoencoder (VQModel)."""
