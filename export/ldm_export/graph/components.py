"""The three graphs of a latent diffusion model: torch modules to trace, and the specs of what they take and give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.functional import interpolate

from ldm_export.checkpoint.folder import Checkpoint
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec

BATCH = Axis("batch", 1, 1, 32)
TOKENS = 77
"""LDMTextToImagePipeline pads every prompt to this length, or to the text encoder's where that is shorter."""
MAX_LATENT = 128
"""Longest side of the latents a graph takes unless the model's own size asks for more (1024 pixels at factor 8)."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one checkpoint that its graphs' shapes derive from."""

    tokens: int
    context_width: int
    latent_channels: int
    latent_size: int
    image_channels: int = 3
    latent_factor: int = 8

    def specs(self) -> dict[str, ComponentSpec]:
        """Name → spec of text_encoder, unet and decoder, with images (batch) and latent height and width dynamic."""
        rows = Axis("batch", BATCH.min, 2 * BATCH.opt, 2 * BATCH.max)  # guidance doubles the batch
        longest = max(MAX_LATENT, 4 * self.latent_size)
        height, width = (Axis(name, 2, self.latent_size, longest) for name in ("height", "width"))
        pixels = tuple(axis * self.latent_factor for axis in (height, width))
        context = ("float32", (self.tokens, self.context_width))
        return {
            "text_encoder": ComponentSpec(
                "text_encoder",
                (TensorSpec("input_ids", "int64", (BATCH, self.tokens)),),
                (TensorSpec("context", context[0], (BATCH, *context[1])),),
            ),
            "unet": ComponentSpec(
                "unet",
                (
                    TensorSpec("sample", "float32", (rows, self.latent_channels, height, width)),
                    TensorSpec("timestep", "int64", (rows,)),
                    TensorSpec("context", context[0], (rows, *context[1])),
                ),
                (TensorSpec("noise_pred", "float32", (rows, self.latent_channels, height, width)),),
            ),
            "decoder": ComponentSpec(
                "decoder",
                (TensorSpec("latents", "float32", (BATCH, self.latent_channels, height, width)),),
                (TensorSpec("image", "float32", (BATCH, self.image_channels, *pixels)),),
            ),
        }


def model_shape(checkpoint: Checkpoint) -> ModelShape:
    """The sizes in a checkpoint's configs."""
    text, unet, autoencoder = (checkpoint.components[name].config for name in ("text_encoder", "unet", "autoencoder"))
    return ModelShape(
        tokens=min(TOKENS, text["max_position_embeddings"]),
        context_width=text["d_model"],
        latent_channels=unet["in_channels"],
        latent_size=unet["sample_size"],
        image_channels=autoencoder["out_channels"],
        latent_factor=2 ** (len(autoencoder["block_out_channels"]) - 1),
    )


class TextEncoder(nn.Module):
    """input_ids int64 [B, T] → last hidden state float32 [B, T, D]; LDMBert's logits head is left out."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert.model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode token ids."""
        return self.bert(input_ids)[0]


class UNet(nn.Module):
    """sample [R, C, h, w], timestep int64 [R], context [R, T, D] → predicted noise [R, C, h, w], all float32."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = free_upsampling(unet)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Predict the noise in ``sample``."""
        return self.unet(sample, timestep, encoder_hidden_states=context, return_dict=False)[0]


class Decoder(nn.Module):
    """latents float32 [B, C, h, w] → image float32 [B, 3, 8h, 8w] in [0, 1]; scaling factor and clamp inside."""

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        self.autoencoder = free_upsampling(autoencoder)
        self.scale = 1 / autoencoder.config.scaling_factor

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents to images."""
        image = self.autoencoder.decode(self.scale * latents, return_dict=False)[0]
        return (image / 2 + 0.5).clamp(0, 1)


MODULES = {"text_encoder": TextEncoder, "unet": UNet, "decoder": Decoder}


class _Upsample(nn.Module):
    """Upsample2D without its branches on the batch and element count, which would pin those dimensions in a trace."""

    def __init__(self, original: Upsample2D):
        super().__init__()
        self.conv = original.conv

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        factor = None if output_size is not None else 2.0
        return self.conv(interpolate(hidden_states, size=output_size, scale_factor=factor, mode="nearest"))


class _Always:
    """Replaces the number of upsamplers, so that ``size % 2**n`` is never zero.

    A UNet then upsamples to the size of each skip connection, whatever its size. For multiples of ``2**n`` the result
    is the same; for other sizes it is the only correct one.
    """

    def __rpow__(self, base: int) -> _Always:
        return self

    def __rmod__(self, size: int) -> int:
        return 1


def free_upsampling(module: nn.Module) -> nn.Module:
    """Make a diffusers model's upsampling traceable for any batch and size; its results stay the same."""
    for name, child in list(module.named_children()):
        if isinstance(child, Upsample2D) and child.interpolate and child.use_conv and child.norm is None:
            setattr(module, name, _Upsample(child))
        else:
            free_upsampling(child)
    if hasattr(module, "num_upsamplers"):
        module.num_upsamplers = _Always()
    return module
