"""Memory of activations by the size of the latents, estimated from the configs of UNet and autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_export.graph.quantizer import CODES_AT_ONCE

__all__ = ["activation_memory"]

FLOAT = 4
LIVE = 10
"""Tensors of the first width that ONNX Runtime's allocator holds at most, as measured: those of a residual block and of
its normalization, and memory that is kept for the next operator."""

DISTANCES = 3
"""Tensors of distances that are alive at once: the products, their roots, and one that is kept."""


def activation_memory(unet: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> dict[str, int]:
    """Settings of a conditioning for ``ldm_runtime.required_memory.required_bytes``.

    The largest of three counts: the decoder, whose first width has the size of the image; the UNet, whose up blocks
    hold the skip connections; and the distances of a quantized latent to a part of the codes. Attention is computed
    block by block and needs no memory of its own.

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
