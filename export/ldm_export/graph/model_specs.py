"""Specs of the components that all families share, from the sizes of a checkpoint."""

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
"""Name of the component that encodes images to latents, in families that can start from an image."""
IMAGES = Axis("batch", 1, 1, 32)
"""Images of one call."""
CHUNKS = "chunks"
"""Name of the axis that counts the chunks of a long prompt."""
MAX_LATENT = 128
"""Longest side of a graph's latents, 1024 pixels at factor 8, unless the model's default size needs more."""


def rows(branches: int) -> Axis:
    """Rows of one UNet call: one for each image and guidance branch. A call without guidance has one branch."""
    count = max(1, branches)
    return Axis(IMAGES.name, IMAGES.min, count * IMAGES.opt, count * IMAGES.max)


def latent_axes(size: int | tuple[int, int], multiple: int = 4) -> tuple[Axis, Axis]:
    """Height and width of the latents: any from 2 to ``multiple`` times the model's default ``size``.

    Args:
        size: One number, or height and width.
        multiple: Maximum relative to ``size``. The maximum of the axes is at least ``MAX_LATENT``.
    """
    height, width = (size, size) if isinstance(size, int) else size
    longest = max(MAX_LATENT, multiple * height, multiple * width)
    return Axis("height", 2, height, longest), Axis("width", 2, width, longest)


def prompt_axis(tokens: int, chunks: int) -> Dim:
    """Token axis of a prompt's hidden states: the tokens of one chunk or, for long prompts, of several chunks.

    Args:
        tokens: Number of tokens that the text encoder takes.
        chunks: Maximum number of chunks; 1 for models that cut long prompts off.
    """
    return tokens if chunks == 1 else Axis(CHUNKS, 1, 1, chunks, tokens)


def unet_spec(
    latents: Latents, sides: tuple[Dim, Dim], branches: int, conditioning: Sequence[TensorSpec] = ()
) -> ComponentSpec:
    """Spec of the whole UNet, before components are split off.

    Args:
        latents: Number of channels of sample and noise.
        sides: Height and width of the latents.
        branches: Number of guidance branches, 0 without guidance.
        conditioning: Further inputs, whose first dimension is ``rows(branches)``.
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
