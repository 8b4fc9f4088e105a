"""Class-conditional latent diffusion: CompVis' cin256 models of ImageNet (Rombach et al. 2022, section 4.1).

diffusers has no pipeline for these models; checkpoints are those of CompVis/latent-diffusion. A class label becomes one
token of the UNet's cross-attention. A model with an additional class for the unconditional branch supports guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm_export.checkpoint import diffusers_parts as parts
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.layout import ModuleSource, Part
from ldm_export.checkpoint.modules import load_module
from ldm_export.families.family import Family, TracedComponent
from ldm_export.families.reference import Reference, open_reference, pil_image, reference_latents
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import CROSS_ATTENTION_KV, TIME_EMBEDDING
from ldm_export.graph.model_specs import IMAGES, conditioned, decoder_spec, latent_axes, unet_spec
from ldm_export.requests import RequestFields, label_requests
from ldm_runtime.model import DECODER, UNET, ConditioningSpec, Defaults, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import ComponentSpec, TensorSpec

__all__ = ["CLASS_CONDITIONAL", "ClassEmbedder", "describe"]

LABEL_ENCODER, CONTEXT = "label_encoder", "context"
GUIDANCE = ("unconditional", "conditional")
DEFAULTS = Defaults(num_inference_steps=20, eta=0.0, guidance_scale=3.0)
"""Sampling options of the authors' notebook."""


class ClassEmbedder(nn.Module):
    """label int64 [B] -> one token float32 [B, 1, width].

    Args:
        num_classes: Number of classes, including the unconditional class if there is one.
        width: Channels of a token.
        unconditional: True if the last class is that of the unconditional branch.
    """

    def __init__(self, num_classes: int = 1001, width: int = 512, unconditional: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        self.unconditional = num_classes - 1 if unconditional else None

    def forward(self, label: torch.Tensor) -> torch.Tensor:
        """Compute the output of the class's docstring."""
        token: torch.Tensor = self.embedding(label)[:, None, :]
        return token


LABELS = Part(folders=(LABEL_ENCODER,), classes={"ClassEmbedder": ClassEmbedder})


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other."""
    unet, labels = configs["unet"], configs[LABEL_ENCODER]
    return [
        *parts.latent_problems(unet, configs["autoencoder"]),
        *parts.width_problems(unet, labels["width"], "label encoder"),
    ]


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe the model of a checkpoint; "unet" takes ``sample``, ``timestep`` and ``context``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
    """
    configs = checkpoint.configs()
    autoencoder, unet, labels = configs["autoencoder"], configs["unet"], configs[LABEL_ENCODER]
    latents = parts.latents_of(autoencoder)
    sides, token, classes = latent_axes(unet["sample_size"]), (1, labels["width"]), labels["num_classes"]
    guidance = GUIDANCE if labels["unconditional"] else ()
    encoder = ComponentSpec(
        LABEL_ENCODER,
        (TensorSpec("label", "int64", (IMAGES,)),),
        (TensorSpec(CONTEXT, "float32", (IMAGES, *token)),),
        "request",
    )
    settings = {"classes": classes - bool(guidance), "unconditional": classes - 1}
    return ModelDescription(
        family=CLASS_CONDITIONAL.name,
        components={
            LABEL_ENCODER: encoder,
            UNET: unet_spec(latents, sides, len(guidance), (conditioned(CONTEXT, len(guidance), token),)),
            DECODER: decoder_spec(latents, sides, autoencoder["out_channels"]),
        },
        conditioning=(ConditioningSpec("label", LABEL_ENCODER, {}, (CONTEXT,), settings),),
        guidance=guidance,
        latents=latents,
        scheduler=scheduler_from_config(checkpoint.scheduler_config).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
    )


def _reference(checkpoint: Checkpoint) -> Reference:
    return open_reference(checkpoint, load_module(checkpoint, LABEL_ENCODER))


def _reference_image(reference: Reference, request: RequestFields, generator: torch.Generator) -> Image.Image:
    """Generate one image by the equations of the paper, with modules of diffusers."""
    embedder: Any = reference.encoder
    unconditional: int | None = embedder.unconditional
    guided = request["guidance_scale"] != 1 and unconditional is not None
    labels = torch.tensor([unconditional, request["labels"]] if guided else [request["labels"]])
    with torch.no_grad():
        context = reference.encoder(labels)

        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            noise: torch.Tensor = reference.unet(torch.cat([sample] * len(labels)), timestep, context)[0]
            if not guided:
                return noise
            plain, conditional = noise.chunk(2)
            guided_noise: torch.Tensor = plain + request["guidance_scale"] * (conditional - plain)
            return guided_noise

        return pil_image(reference.decoder(reference_latents(reference, predict, request, generator)))


CLASS_CONDITIONAL = Family(
    name="class_conditional",
    pipelines=(),
    layout=parts.layout(
        "class-conditional",
        _problems,
        unet=parts.UNET_CONDITION,
        parts={LABEL_ENCODER: LABELS},
        modules={LABEL_ENCODER: ModuleSource(LABEL_ENCODER)},
    ),
    components={
        LABEL_ENCODER: TracedComponent(LABEL_ENCODER, lambda module: module),
        UNET: TracedComponent("unet", wrappers.UNet, (CROSS_ATTENTION_KV, TIME_EMBEDDING)),
        DECODER: TracedComponent("decoder", wrappers.Decoder),
    },
    files={},
    describe=describe,
    quantize=(UNET, DECODER),
    requests=label_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: label_encoder (ClassEmbedder), unet (UNet2DConditionModel) and autoencoder (VQModel or AutoencoderKL)."""
