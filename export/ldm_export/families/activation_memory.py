"""Estimates activation memory per latent from the configs of UNet and autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_export.graph.quantizer import CODES_AT_ONCE

__all__ = ["activation_memory"]

FLOAT = 4
LIVE = 10
"""Measured maximum number of tensors of the first width that ONNX Runtime's allocator holds: those of a residual block
and its normalization, and memory reserved for the next operator."""

DISTANCES = 3
"""Number of distance tensors in memory at once: the products, their roots, and one more."""


def activation_memory(unet: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> dict[str, int]:
    """Return conditioning settings for ``ldm_runtime.required_memory.required_bytes``.

    The estimate is the largest of three: the decoder, whose first width has the size of the image; the UNet, whose up
    blocks need the skip connections; and the distances of quantized latents to a part of the codes. Attention is
    computed block by block and is not counted.

    Args:
        unet, autoencoder: Full configs of UNet2DModel and of VQModel or AutoencoderKL.

    Returns:
        "bytes_per_latent".
    """
    factor = 2 ** (len(autoencoder["block_out_channels"]) - 1)
    decoder = LIVE * FLOAT * autoencoder["block_out_channels"][0] * factor**2
    skips = sum(
        width * (unet["layers_per_block"] + 1) / 4**level for level, width in enumerate(unet["block_out_channels"])
    )
    network = FLOAT * (skips + LIVE * 2 * unet["block_out_channels"][0])
    codes = DISTANCES * FLOAT * min(autoencoder.get("num_vq_embeddings", 0), CODES_AT_ONCE)
    return {"bytes_per_latent": round(max(decoder, network, codes))}
