"""Memory of activations by the size of the latents, estimated from the configs of UNet and autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_runtime.required_memory import PAIRS

__all__ = ["activation_memory"]

FLOAT = 4
LIVE = 3
"""Tensors of a residual block that are alive at once: its input, its output, and the one between."""


def activation_memory(unet: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> dict[str, int]:
    """Settings of a conditioning for ``ldm_runtime.required_memory.required_bytes``.

    The largest of two components counts: the decoder, whose first width has the size of the image, and the UNet, whose
    up blocks hold the skip connections. Attention holds its scores and their softmax, for each head.

    Args:
        unet, autoencoder: Full configs of UNet2DModel and of VQModel or AutoencoderKL.

    Returns:
        "bytes_per_latent", and "bytes_per_pairs" for each ``PAIRS`` pairs of latents.
    """
    factor = 2 ** (len(autoencoder["block_out_channels"]) - 1)
    decoder = LIVE * FLOAT * autoencoder["block_out_channels"][0] * factor**2
    skips = sum(
        width * (unet["layers_per_block"] + 1) / 4**level for level, width in enumerate(unet["block_out_channels"])
    )
    network = FLOAT * (skips + LIVE * 2 * unet["block_out_channels"][0])
    attended = [level for level, kind in enumerate(unet["down_block_types"]) if "Attn" in kind]
    last = len(unet["block_out_channels"]) - 1
    heads = [unet["block_out_channels"][level] // unet["attention_head_dim"] / 16**level for level in (*attended, last)]
    pairs = max(2 * FLOAT * max(heads), 2 * FLOAT * autoencoder["mid_block_add_attention"])
    return {"bytes_per_latent": round(max(decoder, network)), "bytes_per_pairs": round(pairs * PAIRS)}
