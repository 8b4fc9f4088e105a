"""Text-to-image latent diffusion: diffusers' LDMTextToImagePipeline (Rombach et al. 2022, arXiv:2112.10752).

Two layouts are published: ``CompVis/ldm-text2im-large-256`` (current names) and the older
``fusing/latent-diffusion-text2im-large``. The text encoder is an LDMBert without its unused ``to_logits`` head; its
hidden states condition the UNet by cross-attention. Prompts are tokenized by BERT's WordPiece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import LDMTextToImagePipeline
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import BertTokenizerFast  # type: ignore[attr-defined]

from ldm_export.checkpoint.diffusers_parts import (
    UNET_CONDITION,
    latent_problems,
    latent_size,
    latents_of,
    layout,
    pixels_per_latent,
    text_problems,
)
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.layout import FileFolder, ModuleSource, Part, WeightNames
from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.placeholder_vocabulary import placeholder_tokenizer
from ldm_export.checkpoint.tokenizer_files import write_tokenizer_json
from ldm_export.families.family import BundleFile, Family, TracedComponent
from ldm_export.families.reference import diffusers_pipeline
from ldm_export.graph import wrappers
from ldm_export.graph.component_split import CROSS_ATTENTION_KV, TIME_EMBEDDING
from ldm_export.graph.model_specs import IMAGES, conditioned, decoder_spec, latent_axes, prompt_axis, unet_spec
from ldm_export.requests import RequestFields, text_requests
from ldm_runtime.bundle_layout import TOKENIZER
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import DECODER, UNET, ConditioningSpec, Defaults, Latents, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import ComponentSpec, TensorSpec

__all__ = [
    "CONTEXT",
    "GUIDANCE",
    "TEXT_ENCODER",
    "TEXT_TO_IMAGE",
    "ModelShape",
    "TextEncoder",
    "check_token_ids",
    "describe",
    "model_shape",
    "tokenizer_folder",
]

TEXT_ENCODER, CONTEXT = "text_encoder", "context"
TOKENS = 77
"""The pipeline pads every prompt to this length, or to the text encoder's maximum if it is shorter."""
GUIDANCE = ("unconditional", "conditional")
PIPELINE_FACTOR = 8
"""Pixels per latent that diffusers' pipeline assumes of every autoencoder."""
DEFAULTS = Defaults(num_inference_steps=50, eta=0.3, guidance_scale=6.0)
"""Sampling options of LDMTextToImagePipeline's example."""
VOCABULARY_FILES = ("vocab.txt", "tokenizer.json")
VOCABULARY = "the vocab.txt of bert-base-uncased, or the vocabulary it was trained with"

BERT = Part(
    folders=("bert", "text_encoder"),
    classes={"LDMBertModel": LDMBertConfig},
    older_keys={
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_dim",
    },
    weights=WeightNames(((r"^(?!model\.)", "model."),)),  # saved without the head on top
    construct=lambda config: LDMBertModel(LDMBertConfig(**config)),  # type: ignore[no-untyped-call]
)


class TextEncoder(nn.Module):
    """input_ids int64 [B, T] -> last hidden state float32 [B, T, D]."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert: Any = bert.model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode the token ids of prompts."""
        states: torch.Tensor = self.bert(input_ids)[0]
        return states


def _problems(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Check that the components fit each other, and that the pipeline provides every input of the UNet."""
    text, unet, autoencoder = (configs[name] for name in (TEXT_ENCODER, "unet", "autoencoder"))
    return [*text_problems(unet, text["d_model"]), *latent_problems(unet, autoencoder)]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a checkpoint, from which the shapes of its graphs are derived.

    Attributes:
        tokens: Number of tokens of a prompt.
        context_width: Channels of the text encoder's hidden states.
        latents: Channels of the latents, and pixels per latent.
        latent_size: The model's default height and width in latents; one number for both.
        image_channels: Channels of the decoded image.
    """

    tokens: int
    context_width: int
    latents: Latents
    latent_size: int | tuple[int, int]
    image_channels: int

    def specs(self, chunks: int = 1) -> dict[str, ComponentSpec]:
        """Component -> spec; "unet" takes ``timestep`` and ``context``, hidden states of up to ``chunks`` chunks."""
        sides, states = latent_axes(self.latent_size), (self.tokens, self.context_width)
        encoder = ComponentSpec(
            TEXT_ENCODER,
            (TensorSpec("input_ids", "int64", (IMAGES, self.tokens)),),
            (TensorSpec(CONTEXT, "float32", (IMAGES, *states)),),
            "request",
        )
        prompt = (prompt_axis(self.tokens, chunks), self.context_width)
        conditioning = (conditioned(CONTEXT, len(GUIDANCE), prompt),)
        return {
            TEXT_ENCODER: encoder,
            UNET: unet_spec(self.latents, sides, len(GUIDANCE), conditioning),
            DECODER: decoder_spec(self.latents, sides, self.image_channels),
        }


def model_shape(configs: Mapping[str, Mapping[str, Any]]) -> ModelShape:
    """Read the sizes from a checkpoint's full configs."""
    text, unet, autoencoder = (configs[name] for name in (TEXT_ENCODER, "unet", "autoencoder"))
    return ModelShape(
        tokens=min(TOKENS, text["max_position_embeddings"]),
        context_width=text["d_model"],
        latents=latents_of(autoencoder),
        latent_size=latent_size(unet, autoencoder),
        image_channels=autoencoder["out_channels"],
    )


def describe(checkpoint: Checkpoint) -> ModelDescription:
    """Describe the model of a checkpoint, with the specs of ``ModelShape``.

    Raises:
        SpecError: The runtime does not support the scheduler with these options.
    """
    shape = model_shape(checkpoint.configs())
    return ModelDescription(
        family=TEXT_TO_IMAGE.name,
        components=shape.specs(),
        conditioning=(ConditioningSpec("text", TEXT_ENCODER, {"tokenizer": TOKENIZER}, (CONTEXT,)),),
        guidance=GUIDANCE,
        latents=shape.latents,
        scheduler=scheduler_from_config(checkpoint.scheduler_config).to_config(),
        defaults=checkpoint.defaults or DEFAULTS,
    )


@contextmanager
def tokenizer_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield the folder of the checkpoint's tokenizer; a placeholder for random weights without a vocabulary.

    A vocabulary that is a single file is copied into a folder under the file name that tokenizers expect.
    """
    source = checkpoint.files["tokenizer"]
    if source.is_file():
        with TemporaryDirectory() as folder:
            name = "tokenizer.json" if source.suffix == ".json" else "vocab.txt"
            yield Path(copyfile(source, Path(folder) / name)).parent
        return
    if checkpoint.random_seed is None or any((source / name).exists() for name in VOCABULARY_FILES):
        yield source
        return
    with TemporaryDirectory() as folder:
        yield placeholder_tokenizer(source, Path(folder))


def _write_tokenizer(checkpoint: Checkpoint, target: Path) -> None:
    with tokenizer_folder(checkpoint) as folder:
        write_tokenizer_json(folder, target)
    check_token_ids(checkpoint, target)


def check_token_ids(
    checkpoint: Checkpoint, tokenizer: Path, name: str = "tokenizer", encoder: str = TEXT_ENCODER
) -> None:
    """Check that a text encoder has an embedding for every token of a tokenizer.json, made from the files ``name``.

    Raises:
        CheckpointError: The tokenizer has more tokens.
    """
    added = checkpoint.added_tokens.get(name, ())  # the text encoder gets rows for them
    own = {
        token: index for token, index in Tokenizer.from_file(str(tokenizer)).get_vocab().items() if token not in added
    }
    token, highest = max(own.items(), key=lambda item: item[1])
    known = checkpoint.components[encoder].config["vocab_size"]
    if highest >= known:
        raise CheckpointError(
            f"{name}: {checkpoint.files[name]}: token {token!r:.40} has id {highest}, but the text encoder "
            f"embeds {known} tokens; use the tokenizer and the text encoder of one checkpoint"
        )


def _reference(checkpoint: Checkpoint) -> Any:
    with tokenizer_folder(checkpoint) as folder:
        tokenizer = BertTokenizerFast.from_pretrained(str(folder))
    text_encoder = load_module(checkpoint, TEXT_ENCODER)
    return diffusers_pipeline(LDMTextToImagePipeline, checkpoint, bert=text_encoder, tokenizer=tokenizer)


def _reference_image(pipeline: Any, request: RequestFields, generator: torch.Generator) -> Image.Image:
    """Run diffusers' pipeline, which always divides height and width by 8, whatever the autoencoder's factor is."""
    factor = pixels_per_latent(pipeline.vqvae.config)
    image: Image.Image = pipeline(
        [request["prompts"]],
        generator=generator,
        height=request["height"] // factor * PIPELINE_FACTOR,
        width=request["width"] // factor * PIPELINE_FACTOR,
        eta=request["eta"],
        guidance_scale=request["guidance_scale"],
        num_inference_steps=request["num_inference_steps"],
    ).images[0]
    return image


TEXT_TO_IMAGE = Family(
    name="text_to_image",
    pipelines=("LDMTextToImagePipeline", "LatentDiffusionPipeline", "LatentDiffusion"),
    layout=layout(
        "text-to-image",
        _problems,
        unet=UNET_CONDITION,
        parts={TEXT_ENCODER: BERT},
        modules={TEXT_ENCODER: ModuleSource(TEXT_ENCODER, {"to_logits": nn.Identity})},
        files={"tokenizer": FileFolder(("tokenizer",), VOCABULARY_FILES, VOCABULARY, or_file=True)},
    ),
    components={
        TEXT_ENCODER: TracedComponent(TEXT_ENCODER, TextEncoder),
        UNET: TracedComponent("unet", wrappers.UNet, (CROSS_ATTENTION_KV, TIME_EMBEDDING)),
        DECODER: TracedComponent("decoder", wrappers.Decoder),
    },
    files={"tokenizer": BundleFile(TOKENIZER, "tokenizer", _write_tokenizer)},
    describe=describe,
    quantize=(UNET, DECODER, TEXT_ENCODER),
    requests=text_requests,
    reference=_reference,
    reference_image=_reference_image,
)
"""Parts: text_encoder (LDMBertModel), unet (UNet2DConditionModel) and autoencoder (AutoencoderKL or VQModel)."""
