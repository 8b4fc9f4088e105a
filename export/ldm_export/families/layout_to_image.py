"""Layout to image by latent diffusion: CompVis' layout2img models (Rombach et al. 2022, section 4.3.1).

diffusers has no pipeline for these models; checkpoints are those of CompVis/latent-diffusion. The tokens of a layout
are encoded like a text, by a BERTEmbedder without a tokenizer. With a file of category names, requests can use names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm_export.checkpoint import diffusers_parts as parts
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.layout import FileFolder, ModuleSource
from ldm_export.checkpoint.modules import load_module
from ldm_export.families.family import BundleFile, Family, TracedComponent
from ldm_export.families.reference import Reference, open_reference, pil_image, reference_latents
from ldm_export.families.text_to_image import BERT, TextEncoder
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import CROSS_ATTENTION_KV, TIME_EMBEDDING
from ldm_export.graph.model_specs import IMAGES, conditioned, decoder_spec, latent_axes, unet_spec
from ldm_export.requests import RequestFields, layout_requests
from ldm_runtime.conditioning.layout import read_categories
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import DECODER, UNET, ConditioningSpec, Defaults, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import ComponentSpec, TensorSpec

__all__ = ["LAYOUT_TO_IMAGE", "describe"]

ENCODER, CONTEXT = "layout_encoder", "context"
CATEGORIES, CATEGORIES_FILE = "categories", "categories.txt"
DEFAULTS = Defaults(num_inference_steps=200, eta=0.0, guidance_scale=1.0)
"""Sampling options of the paper."""


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other."""
    unet, layouts = configs["unet"], configs[ENCODER]
    problems = parts.latent_problems(unet, configs["autoencoder"])
    problems += parts.width_problems(unet, layouts["d_model"], "layout encoder")
    if layouts["max_position_embeddings"] % 3 != 2:
        tokens = layouts["max_position_embeddings"]
        problems.append(f"the layout encoder takes {tokens} tokens, three for each object and two are others")
    return problems


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe the model of a checkpoint; "unet" takes ``sample``, ``timestep`` and ``context``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
    """
    configs = checkpoint.configs()
    unet, autoencoder, layouts = configs["unet"], configs["autoencoder"], configs[ENCODER]
    latents, sides = parts.latents_of(autoencoder), latent_axes(unet["sample_size"])
    tokens = layouts["max_position_embeddings"]
    context = (tokens, layouts["d_model"])
    encoder = ComponentSpec(
        ENCODER,
        (TensorSpec("tokens", "int64", (IMAGES, tokens)),),
        (TensorSpec(CONTEXT, "float32", (IMAGES, *context)),),
        "request",
    )
    files = {CATEGORIES: CATEGORIES_FILE} if CATEGORIES in checkpoint.files else {}
    settings = {"vocabulary": layouts["vocab_size"]}
    return ModelDescription(
        family=LAYOUT_TO_IMAGE.name,
        components={
            ENCODER: encoder,
            UNET: unet_spec(latents, sides, 0, (conditioned(CONTEXT, 0, context),)),
            DECODER: decoder_spec(latents, sides, autoencoder["out_channels"]),
        },
        conditioning=(ConditioningSpec("layout", ENCODER, files, (CONTEXT,), settings),),
        guidance=(),
        latents=latents,
        scheduler=scheduler_from_config(checkpoint.scheduler_config).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
    )


def _write_categories(checkpoint: Checkpoint, target: Path) -> None:
    names = read_categories(checkpoint.files[CATEGORIES], CheckpointError)
    known = checkpoint.components[ENCODER].config["vocab_size"] - 1
    if len(names) > known:
        raise CheckpointError(
            f"{checkpoint.files[CATEGORIES]}: got {len(names)} categories, but the layout encoder has tokens for "
            f"{known}; give the categories the checkpoint was trained with"
        )
    target.write_text("\n".join(names) + "\n", encoding="utf-8")


def _reference(checkpoint: Checkpoint) -> Reference:
    return open_reference(checkpoint, TextEncoder(load_module(checkpoint, ENCODER)))


def _reference_image(reference: Reference, request: RequestFields, generator: torch.Generator) -> Image.Image:
    """Generate one image by the equations of the paper, with modules of diffusers."""
    with torch.no_grad():
        context = reference.encoder(torch.tensor([request["tokens"]]))

        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            noise: torch.Tensor = reference.unet(sample, timestep, context)[0]
            return noise

        return pil_image(reference.decoder(reference_latents(reference, predict, request, generator)))


LAYOUT_TO_IMAGE = Family(
    name="layout_to_image",
    pipelines=(),
    layout=parts.layout(
        "layout-to-image",
        _problems,
        unet=parts.UNET_CONDITION,
        parts={ENCODER: BERT},
        modules={ENCODER: ModuleSource(ENCODER, {"to_logits": nn.Identity})},
        files={CATEGORIES: FileFolder((CATEGORIES,), (CATEGORIES_FILE,))},
    ),
    components={
        ENCODER: TracedComponent(ENCODER, TextEncoder),
        UNET: TracedComponent("unet", wrappers.UNet, (CROSS_ATTENTION_KV, TIME_EMBEDDING)),
        DECODER: TracedComponent("decoder", wrappers.Decoder),
    },
    files={CATEGORIES: BundleFile(CATEGORIES_FILE, CATEGORIES, _write_categories)},
    describe=describe,
    quantize=(UNET, DECODER),
    requests=layout_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: layout_encoder (LDMBertModel), unet (UNet2DConditionModel) and autoencoder (VQModel or AutoencoderKL)."""
