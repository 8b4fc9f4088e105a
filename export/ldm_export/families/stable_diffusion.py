"""Stable Diffusion 1.x and 2.x: text to image, image to image and inpainting, like diffusers' three pipelines.

The text encoder is CLIP's (OpenAI's in 1.x, OpenCLIP's without its last layer in 2.x); its hidden states condition the
UNet by cross-attention. Prompts are tokenized by CLIP's byte-level BPE. Unlike LDMTextToImagePipeline, the pipeline
turns guidance off for every scale up to 1, corrects two options of old schedulers, and divides the latents by the
autoencoder's scaling factor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import nn

from ldm_export.checkpoint import diffusers_parts as parts
from ldm_export.checkpoint.clip_tokenizer_files import CLIP_FILES
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.layout import FileFolder, ModuleSource
from ldm_export.checkpoint.modules import load_module
from ldm_export.families.clip_text import (
    CLIP_TEXT,
    MAX_CHUNKS,
    TOKENIZER_FOLDER,
    clip_inputs,
    clip_tokenizer,
    clip_tokens,
    write_clip_tokenizer,
)
from ldm_export.families.family import BundleFile, Family, TracedComponent
from ldm_export.families.guidance_embedding import embedded_guidance, with_guidance_embedding
from ldm_export.families.image_reference import reference_call
from ldm_export.families.reference import diffusers_pipeline
from ldm_export.families.safety_checker import (
    FEATURE_EXTRACTOR,
    FEATURE_EXTRACTOR_FILES,
    SAFETY_PART,
    SafetyScores,
    checker_conditioning,
    checker_spec,
)
from ldm_export.families.text_to_image import CONTEXT, GUIDANCE, TEXT_ENCODER, ModelShape
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import CROSS_ATTENTION_KV, TIME_EMBEDDING
from ldm_export.graph.model_specs import ENCODER, IMAGES, conditioned, encoder_spec, latent_axes
from ldm_export.requests import RequestFields, text_requests
from ldm_runtime.bundle_layout import TOKENIZER
from ldm_runtime.conditioning.text_encoder import SKIPPED
from ldm_runtime.model import DECODER, SAFETY_CHECKER, UNET, ConditioningSpec, Defaults, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import TensorSpec

__all__ = ["MASKED_IMAGE", "NOT_EXPORTED", "STABLE_DIFFUSION", "ClipTextEncoder", "describe"]

log = logging.getLogger(__name__)

DEFAULTS = Defaults(num_inference_steps=50, eta=0.0, guidance_scale=7.5)
"""Sampling options of StableDiffusionPipeline."""
CORRECTED = {"steps_offset": 1, "clip_sample": False}
"""Scheduler options that StableDiffusionPipeline sets, whatever the checkpoint says."""
MASKED_IMAGE = "masked_image"
NOT_EXPORTED = {
    "image_encoder": "it is not exported; image prompts are not supported",
}
"""Parts of a checkpoint that are not exported, with a warning for each."""


class ClipTextEncoder(nn.Module):
    """Hidden states of CLIP's text encoder after its final layer norm.

    input_ids and attention_mask int64 [B, T] -> hidden states of the last layer, float32 [B, T, D], and hidden states
    without the last 1, 2, … layers, float32 [B, layers, T, D]. Tokens with mask 0 are not attended to.
    """

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the token ids of prompts."""
        states = self.clip(input_ids, attention_mask, output_hidden_states=True).hidden_states
        norm: Any = getattr(self.clip, "text_model", self.clip).final_layer_norm
        last, *skipped = (norm(state) for state in reversed(states))
        return last, torch.stack(skipped, 1)


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other, and that the pipeline provides every input of the UNet."""
    text, unet, autoencoder = (configs[name] for name in (TEXT_ENCODER, "unet", "autoencoder"))
    if parts.takes_mask(unet):
        unet = {**unet, "in_channels": unet["out_channels"]}
    return [
        *parts.text_problems(unet, text["hidden_size"], embedded_guidance(unet)),
        *parts.latent_problems(unet, autoencoder),
    ]


def _scheduler_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The scheduler's options, with those that StableDiffusionPipeline sets."""
    config = checkpoint.scheduler_config
    changed = {name: value for name, value in CORRECTED.items() if config.get(name, value) != value}
    for name, value in changed.items():
        log.info("scheduler: %s: got %s, sampled with %s as by StableDiffusionPipeline", name, config[name], value)
    return {**config, **changed}


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe a checkpoint's model; "unet" takes ``sample``, ``timestep``, ``context`` and maybe ``masked_image``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
        CheckpointError: The tokenizer's config cannot be read.
    """
    configs = checkpoint.configs()
    text, unet, autoencoder = (configs[name] for name in (TEXT_ENCODER, "unet", "autoencoder"))
    shape = ModelShape(
        tokens=clip_tokens(checkpoint),
        context_width=text["hidden_size"],
        latents=parts.latents_of(autoencoder),
        latent_size=parts.latent_size(unet, autoencoder),
        image_channels=autoencoder["out_channels"],
    )
    specs, sides = shape.specs(chunks=MAX_CHUNKS), latent_axes(shape.latent_size)
    inputs = (MASKED_IMAGE,) if parts.takes_mask(unet) else ()
    if inputs:
        channels = (1 + shape.latents.channels, *sides)
        taken = (*specs[UNET].inputs, conditioned(MASKED_IMAGE, len(GUIDANCE), channels))
        specs[UNET] = replace(specs[UNET], inputs=taken)
    encoder = specs[TEXT_ENCODER]
    skipped = (IMAGES, text["num_hidden_layers"], shape.tokens, shape.context_width)
    outputs = (*encoder.outputs, TensorSpec(f"{SKIPPED}{CONTEXT}", "float32", skipped))
    model = ModelDescription(
        family=STABLE_DIFFUSION.name,
        components={
            TEXT_ENCODER: replace(encoder, inputs=clip_inputs(shape.tokens), outputs=outputs),
            ENCODER: encoder_spec(shape.latents, sides, autoencoder["in_channels"]),
            **{name: spec for name, spec in specs.items() if name != TEXT_ENCODER},
        },
        conditioning=(
            ConditioningSpec("text", TEXT_ENCODER, {"tokenizer": TOKENIZER}, (CONTEXT,)),
            ConditioningSpec("start_image", ENCODER, {}, inputs),
        ),
        guidance=GUIDANCE,
        latents=shape.latents,
        scheduler=scheduler_from_config(_scheduler_config(checkpoint)).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
        guidance_above_one=True,
    )
    if (checker := configs.get(SAFETY_CHECKER)) is not None:
        model = replace(
            model,
            components={**model.components, SAFETY_CHECKER: checker_spec(checker)},
            conditioning=(*model.conditioning, checker_conditioning(checkpoint)),
        )
    return with_guidance_embedding(model, unet, checkpoint.defaults)


def _reference(checkpoint: Checkpoint) -> Any:
    from diffusers import StableDiffusionPipeline  # its import takes long and reports packages that are missing

    text_encoder = load_module(checkpoint, TEXT_ENCODER)
    if not hasattr(text_encoder, "text_model"):  # of transformers before 5, which diffusers asks for with clip_skip
        object.__setattr__(text_encoder, "text_model", text_encoder)
    return diffusers_pipeline(
        StableDiffusionPipeline,
        replace(checkpoint, scheduler_config=_scheduler_config(checkpoint)),
        first_stage="vae",
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(checkpoint),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _reference_image(pipeline: Any, request: RequestFields, generator: torch.Generator) -> Image.Image:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    kinds = (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
    call = reference_call(pipeline, request, kinds, requires_safety_checker=False)
    image: Image.Image = call(
        [request["prompts"]],
        generator=generator,
        eta=request["eta"],
        guidance_scale=request["guidance_scale"],
        num_inference_steps=request["num_inference_steps"],
        negative_prompt=[request.get("negative_prompt", "")],
        clip_skip=request.get("clip_skip"),
    ).images[0]
    return image


_LAYOUT = parts.layout(
    "Stable Diffusion",
    _problems,
    unet=parts.UNET_CONDITION,
    parts={TEXT_ENCODER: CLIP_TEXT},
    modules={
        TEXT_ENCODER: ModuleSource(TEXT_ENCODER),
        ENCODER: parts.ENCODER_MODULE,
        SAFETY_CHECKER: ModuleSource(SAFETY_CHECKER),
    },
    files={
        "tokenizer": FileFolder(("tokenizer",), CLIP_FILES, TOKENIZER_FOLDER),
        FEATURE_EXTRACTOR: FEATURE_EXTRACTOR_FILES,
    },
)
STABLE_DIFFUSION = Family(
    name="stable_diffusion",
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
    ),
    layout=replace(
        _LAYOUT,
        parts={**_LAYOUT.parts, "autoencoder": parts.KL_AUTOENCODER, SAFETY_CHECKER: SAFETY_PART},
        not_exported=NOT_EXPORTED,
        optional=frozenset({SAFETY_CHECKER, FEATURE_EXTRACTOR}),
    ),
    components={
        TEXT_ENCODER: TracedComponent(TEXT_ENCODER, ClipTextEncoder),
        ENCODER: TracedComponent(ENCODER, wrappers.Encoder),
        UNET: TracedComponent("unet", wrappers.text_unet, (CROSS_ATTENTION_KV, TIME_EMBEDDING)),
        DECODER: TracedComponent("decoder", lambda autoencoder: wrappers.Decoder(autoencoder, divide=True)),
        SAFETY_CHECKER: TracedComponent(SAFETY_CHECKER, SafetyScores),
    },
    files={"tokenizer": BundleFile(TOKENIZER, "tokenizer", write_clip_tokenizer)},
    describe=describe,
    quantize=(UNET, DECODER, TEXT_ENCODER),
    precise=(SAFETY_CHECKER,),
    fractional_timesteps=True,
    requests=text_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: text_encoder (CLIPTextModel), unet (UNet2DConditionModel), autoencoder (AutoencoderKL) and, optionally,
safety_checker (StableDiffusionSafetyChecker)."""
