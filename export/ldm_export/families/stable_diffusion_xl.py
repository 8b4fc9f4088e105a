"""Stable Diffusion XL: text to image, image to image and inpainting, as diffusers' three pipelines.

Two text encoders of CLIP read the prompt; the hidden states before their last layers, side by side, condition the UNet
by cross-attention. The pooled state of the second encoder and the sizes of micro-conditioning are embedded and added to
the timestep's embedding (Podell et al. 2023, arXiv:2307.01952). SDXL Turbo has the same parts. UNets that were trained
to inpaint take a mask, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from ldm_export.checkpoint import diffusers_parts as parts
from ldm_export.checkpoint.clip_tokenizer_files import CLIP_FILES
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.layout import FileFolder, ModuleSource
from ldm_export.checkpoint.modules import load_module
from ldm_export.families.clip_text import (
    CLIP_PROJECTION,
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
from ldm_export.families.stable_diffusion import MASKED_IMAGE, NOT_EXPORTED
from ldm_export.families.text_to_image import CONTEXT, GUIDANCE, TEXT_ENCODER
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import ADDED_EMBEDDING, CROSS_ATTENTION_KV, TIME_EMBEDDING
from ldm_export.graph.model_specs import (
    ENCODER,
    IMAGES,
    conditioned,
    decoder_spec,
    encoder_spec,
    latent_axes,
    prompt_axis,
    rows,
    unet_spec,
)
from ldm_export.graph.xl_wrappers import SecondXLTextEncoder, XLTextEncoder, xl_unet
from ldm_export.requests import RequestFields, text_requests
from ldm_runtime.bundle_layout import TOKENIZER, TOKENIZER_2
from ldm_runtime.conditioning.micro_conditioning import MICRO_FIELDS
from ldm_runtime.conditioning.strength import strength_settings
from ldm_runtime.conditioning.text import ZEROS
from ldm_runtime.conditioning.text_encoder import SKIPPED
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import DECODER, UNET, ConditioningSpec, Defaults, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import ComponentSpec, TensorSpec

__all__ = ["FORCE_ZEROS", "STABLE_DIFFUSION_XL", "describe"]

TEXT_ENCODER_2, CONTEXT_2, TEXT_EMBEDS, TIME_IDS = "text_encoder_2", "context_2", "text_embeds", "time_ids"
SIZES = 6
"""Numbers of micro-conditioning: original height and width, top and left of the crop, target height and width."""
DEFAULTS = Defaults(num_inference_steps=50, eta=0.0, guidance_scale=5.0)
"""As StableDiffusionXLPipeline's."""
STRENGTHS = strength_settings(image=0.3, mask=0.9999)
"""Defaults of StableDiffusionXLImg2ImgPipeline and StableDiffusionXLInpaintPipeline."""
FORCE_ZEROS = "force_zeros_for_empty_prompt"
"""Option of the pipeline: without negative prompt, the unconditional branch has states of zeros."""
REFINER = {
    "requires_aesthetics_score": "it is the refiner of Stable Diffusion XL, which is not supported; use the base model"
}
"""Option of the pipelines that start from images -> what a checkpoint with it is."""


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other, and that the pipeline provides every input of the UNet."""
    text, text_2, unet, autoencoder = (configs[name] for name in (TEXT_ENCODER, TEXT_ENCODER_2, "unet", "autoencoder"))
    further = {"addition_embed_type": ("text_time",), **embedded_guidance(unet)}
    problems = parts.text_problems(unet, text["hidden_size"] + text_2["hidden_size"], further)
    denoised = {**unet, "in_channels": unet["out_channels"]} if parts.takes_mask(unet) else unet
    problems += parts.latent_problems(denoised, autoencoder)
    embedded, pooled = unet["projection_class_embeddings_input_dim"], text_2["projection_dim"]
    wanted = pooled + SIZES * (unet["addition_time_embed_dim"] or 0)
    if embedded != wanted:
        problems.append(
            f"the unet's projection_class_embeddings_input_dim is {embedded}, not {wanted} for {SIZES} sizes and "
            f"{pooled} channels of {TEXT_ENCODER_2}"
        )
    if min(text["num_hidden_layers"], text_2["num_hidden_layers"]) < 2:
        problems.append("a text encoder has one layer, expected two at least")
    if autoencoder.get("latents_mean") is not None or autoencoder.get("latents_std") is not None:
        problems.append("the autoencoder's latents_mean and latents_std are set, which is not supported")
    return problems


def _encoder_spec(name: str, number: str, config: Mapping[str, Any], tokens: int) -> ComponentSpec:
    """Spec of a text encoder without pooled states; ``number`` is the suffix of its tensors' names."""
    states = (tokens, config["hidden_size"])
    outputs = (
        TensorSpec(f"{CONTEXT}{number}", "float32", (IMAGES, *states)),
        TensorSpec(f"{SKIPPED}{CONTEXT}{number}", "float32", (IMAGES, config["num_hidden_layers"] - 1, *states)),
    )
    return ComponentSpec(name, clip_inputs(tokens, number), outputs, "request")


def _specs(checkpoint: Checkpoint) -> dict[str, ComponentSpec]:
    configs = checkpoint.configs()
    text, text_2, unet, autoencoder = (configs[name] for name in (TEXT_ENCODER, TEXT_ENCODER_2, "unet", "autoencoder"))
    tokens, tokens_2 = clip_tokens(checkpoint), clip_tokens(checkpoint, "tokenizer_2", TEXT_ENCODER_2)
    if tokens != tokens_2:
        raise CheckpointError(
            f"{checkpoint.folder}: tokenizer pads to {tokens} tokens, tokenizer_2 to {tokens_2}, expected equal numbers"
        )
    latents, sides = parts.latents_of(autoencoder), latent_axes(parts.latent_size(unet, autoencoder))
    second = _encoder_spec(TEXT_ENCODER_2, "_2", text_2, tokens)
    pooled, prompt = text_2["projection_dim"], prompt_axis(tokens, MAX_CHUNKS)
    conditioning: tuple[TensorSpec, ...] = (
        conditioned(CONTEXT, len(GUIDANCE), (prompt, text["hidden_size"])),
        conditioned(CONTEXT_2, len(GUIDANCE), (prompt, text_2["hidden_size"])),
        conditioned(TEXT_EMBEDS, len(GUIDANCE), (pooled,)),
        TensorSpec(TIME_IDS, "int64", (rows(len(GUIDANCE)), SIZES)),
    )
    if parts.takes_mask(unet):
        conditioning += (conditioned(MASKED_IMAGE, len(GUIDANCE), (1 + latents.channels, *sides)),)
    return {
        TEXT_ENCODER: _encoder_spec(TEXT_ENCODER, "", text, tokens),
        TEXT_ENCODER_2: replace(
            second, outputs=(*second.outputs, TensorSpec(TEXT_EMBEDS, "float32", (IMAGES, pooled)))
        ),
        ENCODER: encoder_spec(latents, sides, autoencoder["in_channels"]),
        UNET: unet_spec(latents, sides, len(GUIDANCE), conditioning),
        DECODER: decoder_spec(latents, sides, autoencoder["out_channels"]),
    }


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """The model of a checkpoint; "unet" takes the tensors of ``XLUNet`` or, to inpaint, ``XLInpaintingUNet``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
        CheckpointError: A tokenizer's config cannot be read, or the tokenizers pad to different lengths.
    """
    settings = {ZEROS: int(checkpoint.options[FORCE_ZEROS])}
    first = ConditioningSpec("text", TEXT_ENCODER, {"tokenizer": TOKENIZER}, (CONTEXT,), settings)
    second = ConditioningSpec(
        "second_text", TEXT_ENCODER_2, {"tokenizer": TOKENIZER_2}, (CONTEXT_2, TEXT_EMBEDS), settings
    )
    unet = checkpoint.components["unet"].config
    taken = (MASKED_IMAGE,) if parts.takes_mask(unet) else ()
    start = ConditioningSpec("start_image", ENCODER, {}, taken, STRENGTHS)
    model = ModelDescription(
        family=STABLE_DIFFUSION_XL.name,
        components=_specs(checkpoint),
        conditioning=(first, second, ConditioningSpec("micro_conditioning", "", {}, (TIME_IDS,)), start),
        guidance=GUIDANCE,
        latents=parts.latents_of(checkpoint.components["autoencoder"].config),
        scheduler=scheduler_from_config(checkpoint.scheduler_config).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
        guidance_above_one=True,
    )
    return with_guidance_embedding(model, unet, checkpoint.defaults)


def _reference(checkpoint: Checkpoint) -> Any:
    from diffusers import StableDiffusionXLPipeline  # its import takes long and reports packages that are missing

    return diffusers_pipeline(
        StableDiffusionXLPipeline,
        checkpoint,
        first_stage="vae",
        text_encoder=load_module(checkpoint, TEXT_ENCODER),
        text_encoder_2=load_module(checkpoint, TEXT_ENCODER_2),
        tokenizer=clip_tokenizer(checkpoint),
        tokenizer_2=clip_tokenizer(checkpoint, "tokenizer_2", TEXT_ENCODER_2),
        force_zeros_for_empty_prompt=checkpoint.options[FORCE_ZEROS],
        add_watermarker=False,
    )


_RENAMED = {"prompts_2": "prompt_2", "negative_prompt": "negative_prompt", "negative_prompt_2": "negative_prompt_2"}
_SAME = ("eta", "guidance_scale", "num_inference_steps", "guidance_rescale", "clip_skip")


def _reference_image(pipeline: Any, request: RequestFields, generator: torch.Generator) -> Image.Image:
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline

    names = (*_SAME, *MICRO_FIELDS)
    texts = {theirs: [request[ours]] for ours, theirs in _RENAMED.items() if request.get(ours) is not None}
    options = {name: request[name] for name in names if name in request}
    kinds = (StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
    zeros = {FORCE_ZEROS: pipeline.config[FORCE_ZEROS]}
    call = reference_call(pipeline, request, kinds, **zeros, add_watermarker=False)
    image: Image.Image = call([request["prompts"]], generator=generator, **texts, **options).images[0]
    return image


_LAYOUT = parts.layout(
    "Stable Diffusion XL",
    _problems,
    unet=parts.UNET_CONDITION,
    parts={TEXT_ENCODER: CLIP_TEXT, TEXT_ENCODER_2: CLIP_PROJECTION},
    modules={
        **{name: ModuleSource(name) for name in (TEXT_ENCODER, TEXT_ENCODER_2)},
        ENCODER: parts.ENCODER_MODULE,
    },
    files={name: FileFolder((name,), CLIP_FILES, TOKENIZER_FOLDER) for name in ("tokenizer", "tokenizer_2")},
)
_write_tokenizer_2 = partial(write_clip_tokenizer, name="tokenizer_2", encoder=TEXT_ENCODER_2)
STABLE_DIFFUSION_XL = Family(
    name="stable_diffusion_xl",
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    ),
    layout=replace(
        _LAYOUT,
        parts={**_LAYOUT.parts, "autoencoder": parts.KL_AUTOENCODER},
        not_exported=NOT_EXPORTED,
        refused=REFINER,
        options={FORCE_ZEROS: True},
    ),
    components={
        TEXT_ENCODER: TracedComponent(TEXT_ENCODER, XLTextEncoder),
        TEXT_ENCODER_2: TracedComponent(TEXT_ENCODER_2, SecondXLTextEncoder),
        ENCODER: TracedComponent(ENCODER, wrappers.Encoder),
        UNET: TracedComponent("unet", xl_unet, (CROSS_ATTENTION_KV, ADDED_EMBEDDING, TIME_EMBEDDING)),
        DECODER: TracedComponent("decoder", lambda autoencoder: wrappers.Decoder(autoencoder, divide=True)),
    },
    files={
        "tokenizer": BundleFile(TOKENIZER, "tokenizer", write_clip_tokenizer),
        "tokenizer_2": BundleFile(TOKENIZER_2, "tokenizer_2", _write_tokenizer_2),
    },
    describe=describe,
    quantize=(UNET, DECODER, TEXT_ENCODER, TEXT_ENCODER_2),
    fractional_timesteps=True,
    requests=text_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: text_encoder (CLIPTextModel), text_encoder_2 (CLIPTextModelWithProjection), unet (UNet2DConditionModel) and
autoencoder (AutoencoderKL)."""
