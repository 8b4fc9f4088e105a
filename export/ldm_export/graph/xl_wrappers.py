"""Torch modules for tracing Stable Diffusion XL: its text encoders and its UNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ldm_export.checkpoint.diffusers_parts import takes_mask
from ldm_export.graph.wrappers import UNet

__all__ = ["SecondXLTextEncoder", "XLInpaintingUNet", "XLTextEncoder", "XLUNet", "xl_unet"]


class XLTextEncoder(nn.Module):
    """Hidden states of CLIP's text encoder before its last layer, without the final layer norm.

    input_ids and attention_mask int64 [B, T] -> these hidden states, float32 [B, T, D], and those without 1, 2, …
    further layers, [B, layers - 1, T, D]. Tokens with mask 0 are not attended to.
    """

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encode the token ids of prompts."""
        return _states(self.clip(input_ids, attention_mask, output_hidden_states=True))


class SecondXLTextEncoder(XLTextEncoder):
    """Like ``XLTextEncoder``, with the projected pooled state float32 [B, P] as a third output."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encode the token ids of prompts."""
        encoded = self.clip(input_ids, attention_mask, output_hidden_states=True)
        return (*_states(encoded), encoded.text_embeds)


def _states(encoded: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, last, *skipped = reversed(encoded.hidden_states)
    return last, torch.stack(skipped, 1)


class XLUNet(UNet):
    """A UNet of diffusers with the conditioning of Stable Diffusion XL.

    sample float32 [R, C, h, w], timestep [R], context and context_2 float32 [R, T, D], text_embeds float32 [R, P],
    time_ids int64 [R, 6] and, if it embeds the guidance scale, timestep_cond float32 [R, K] -> predicted noise float32
    [R, C, h, w].
    """

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        context_2: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the output of the class's docstring."""
        noise: torch.Tensor = self.unet(
            sample,
            timestep,
            torch.cat([context, context_2], dim=-1),
            timestep_cond=timestep_cond,
            added_cond_kwargs={"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]
        return noise


class XLInpaintingUNet(XLUNet):
    """A UNet that was trained to inpaint: as ``XLUNet``, with masked_image float32 [R, 1 + C, h, w] after time_ids.

    It is the mask and, after it, the latents of the image without its masked part.
    """

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        context_2: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
        masked_image: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the output of the class's docstring."""
        channels = torch.cat([sample, masked_image], dim=1)
        return super().forward(channels, timestep, context, context_2, text_embeds, time_ids, timestep_cond)


def xl_unet(unet: Any) -> XLUNet:
    """Wrap a UNet2DConditionModel, whether it takes a mask or not."""
    return XLInpaintingUNet(unet) if takes_mask(unet.config) else XLUNet(unet)
