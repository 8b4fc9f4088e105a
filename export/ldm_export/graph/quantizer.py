"""Quantization of a VQ autoencoder's latents that compares with a part of the codes at a time, to save memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["CODES_AT_ONCE", "Quantizer"]

CODES_AT_ONCE = 1024
"""Number of codes per part. The distances of 512 x 512 latents to all of 8,192 codes would need 8.6 GB."""


class Quantizer(nn.Module):
    """Replaces every latent by its nearest code, like diffusers' VectorQuantizer.

    z float32 [B, D, h, w] -> (codes float32 [B, D, h, w], None, (None, None, None)), as VectorQuantizer returns it. Of
    codes with the same distance, the first is taken.

    Args:
        original: A VectorQuantizer of diffusers, whose codes are shared.
    """

    def __init__(self, original: nn.Module):
        super().__init__()
        self.embedding: Any = original.embedding

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, None, tuple[None, None, None]]:
        """Compute the outputs of the class's docstring."""
        z = z.permute(0, 2, 3, 1).contiguous()
        codes = self.embedding(nearest(z.view(-1, z.shape[-1]), self.embedding.weight)).view(z.shape)
        codes = z + (codes - z)  # VectorQuantizer rounds in this way
        return codes.permute(0, 3, 1, 2).contiguous(), None, (None, None, None)


def nearest(latents: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code of each latent, int64 [N], from float32 [N, D] and [K, D]."""
    found, least = [], []
    for start in range(0, len(codes), CODES_AT_ONCE):
        distances = torch.cdist(latents, codes[start : start + CODES_AT_ONCE])
        # One operator for both results, so that an engine that computes all indices first need not keep the distances.
        distance, index = torch.topk(distances, 1, dim=1, largest=False)
        found.append(index + start)
        least.append(distance)
    part = torch.argmin(torch.cat(least, 1), dim=1, keepdim=True)
    return torch.gather(torch.cat(found, 1), 1, part).squeeze(1)
