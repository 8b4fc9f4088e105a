"""Specs of the components that every family has, from the sizes of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from ldm_runtime.model import DECODER, IMAGE, LATENTS, NOISE_PRED, SAMPLE, TIMESTEP, UNET, Latents
from ldm_runtime.specs import Axis, ComponentSpec, Dim, TensorSpec

__all__ = [
    "CHUNKS",
    "ENCODER",
    "IMAGES",
    "MAX_LATENT",
    "conditioned",
    "decoder_spec",
    "encoder_spec",
    "latent_axes",
    "prompt_axis",
    "rows",
    "unet_spec",
]

ENCODER = "encoder"
"""The component that encodes images to latents, of families that can start from an image."""
IMAGES = Axis("batch", 1, 1, 32)
"""Images of one call."""
CHUNKS = "chunks"
"""Axis of the texts that a long prompt is encoded in."""
MAX_LATENT = 128
"""Longest side of the latents a graph takes unless the model's own size asks for more (1024 pixels at factor 8)."""


def rows(branches: int) -> Axis:
    """Rows of one UNet call: one for each image and branch of guidance. A call without guidance has one branch."""
    count = max(1, branches)
    return Axis(IMAGES.name, IMAGES.min, count * IMAGES.opt, count * IMAGES.max)


def latent_axes(size: int | tuple[int, int], multiple: int = 4) -> tuple[Axis, Axis]:
    """Height and width of the latents: free from 2 to ``multiple`` times the model's own ``size``.

    Args:
        size: One number, or height and width.
        multiple: Of the model's own size; the axes take ``MAX_LATENT`` at least.
    """
    height, width = (size, size) if isinstance(size, int) else size
    longest = max(MAX_LATENT, multiple * height, multiple * width)
    return Axis("height", 2, height, longest), Axis("width", 2, width, longest)


def prompt_axis(tokens: int, chunks: int) -> Dim:
    """States of a prompt: those of a text of so many tokens or, for long prompts, of several texts side by side.

    Args:
        tokens: Tokens of a text, as the text encoder takes them.
        chunks: Most texts; 1 for models that cut long prompts off.
    """
    return tokens if chunks == 1 else Axis(CHUNKS, 1, 1, chunks, tokens)


def unet_spec(
    latents: Latents, sides: tuple[Dim, Dim], branches: int, conditioning: Sequence[TensorSpec] = ()
) -> ComponentSpec:
    """Spec of the whole UNet, before anything is split off.

    Args:
        latents: Channels of sample and noise.
        sides: Height and width of the latents.
        branches: Number of guidance branches, 0 without guidance.
        conditioning: Further inputs, with ``rows(branches)`` as leading dimension.
    """
    batch = rows(branches)
    noise = (batch, latents.channels, *sides)
    inputs = (TensorSpec(SAMPLE, "float32", noise), TensorSpec(TIMESTEP, "int64", (batch,)), *conditioning)
    return ComponentSpec(UNET, inputs, (TensorSpec(NOISE_PRED, "float32", noise),), "step")


def conditioned(name: str, branches: int, shape: tuple[Dim, ...]) -> TensorSpec:
    """A float32 conditioning input of the UNet, [rows, *shape]."""
    return TensorSpec(name, "float32", (rows(branches), *shape))


def encoder_spec(latents: Latents, sides: tuple[Dim, Dim], image_channels: int) -> ComponentSpec:
    """Spec of the encoder of start images."""
    height, width = (side * latents.factor for side in sides)
    encoded = (IMAGES, latents.channels, *sides)
    return ComponentSpec(
        ENCODER,
        (TensorSpec(IMAGE, "float32", (IMAGES, image_channels, height, width)),),
        tuple(TensorSpec(name, "float32", encoded) for name in ("mean", "deviation")),
        "request",
    )


def decoder_spec(latents: Latents, sides: tuple[Dim, Dim], image_channels: int) -> ComponentSpec:
    """Spec of the decoder."""
    height, width = (side * latents.factor for side in sides)
    return ComponentSpec(
        DECODER,
        (TensorSpec(LATENTS, "float32", (IMAGES, latents.channels, *sides)),),
        (TensorSpec(IMAGE, "float32", (IMAGES, image_channels, height, width)),),
        "image",
    )
