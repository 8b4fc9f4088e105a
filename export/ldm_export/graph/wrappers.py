"""Torch modules for tracing that several families share: UNet, decoder, encoder, and upsampling for any size."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeGuard

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.functional import interpolate

from ldm_export.checkpoint.diffusers_parts import takes_mask
from ldm_export.graph.quantizer import Quantizer

__all__ = ["ConcatenatedUNet", "Decoder", "DistilledUNet", "Encoder", "UNet", "free_upsampling", "text_unet"]


class UNet(nn.Module):
    """A UNet of diffusers with positional inputs and one output.

    sample float32 [R, C, h, w], timestep int64 or float32 [R] and, for a UNet with cross-attention, context float32
    [R, T, D] and, for one that takes further channels, these float32 [R, K, h, w] -> predicted noise float32
    [R, C, h, w].
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = free_upsampling(unet)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor | None = None,
        channels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the outputs of the class's docstring."""
        if channels is not None:
            sample = torch.cat([sample, channels], dim=1)
        states = {} if context is None else {"encoder_hidden_states": context}
        noise: torch.Tensor = self.unet(sample, timestep, **states, return_dict=False)[0]
        return noise


class DistilledUNet(UNet):
    """A UNet that embeds the guidance scale: as ``UNet``, with the embedding timestep_cond float32 [R, K] as input."""

    def forward(  # type: ignore[override]
        self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, timestep_cond: torch.Tensor
    ) -> torch.Tensor:
        """Compute the outputs of the class's docstring."""
        noise: torch.Tensor = self.unet(sample, timestep, context, timestep_cond=timestep_cond, return_dict=False)[0]
        return noise


class DistilledInpaintingUNet(DistilledUNet):
    """A UNet that embeds the guidance scale and was trained to inpaint.

    Inputs are those of ``DistilledUNet``, with channels float32 [R, 1 + C, h, w] after context.
    """

    def forward(  # type: ignore[override]
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        channels: torch.Tensor,
        timestep_cond: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the outputs of the class's docstring."""
        return super().forward(torch.cat([sample, channels], dim=1), timestep, context, timestep_cond)


def text_unet(unet: Any) -> UNet:
    """Wrap a UNet2DConditionModel with or without an embedded guidance scale, and with or without a mask."""
    if unet.config.time_cond_proj_dim is None:
        return UNet(unet)
    return DistilledInpaintingUNet(unet) if takes_mask(unet.config) else DistilledUNet(unet)


class ConcatenatedUNet(UNet):
    """A UNet2DModel that takes its conditioning as additional channels, for any height and width.

    sample float32 [R, C, h, w], timestep int64 or float32 [R], conditioning float32 [R, K, h, w] -> predicted noise as
    sample.
    """

    def __init__(self, unet: nn.Module):
        super().__init__(unet)
        _upsample_to_skip_connections(self.unet)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Compute the output of the class's docstring."""
        return super().forward(torch.cat([sample, conditioning], dim=1), timestep)


class Decoder(nn.Module):
    """latents float32 [B, C, h, w] -> image float32 [B, channels, factor * h, factor * w] in [0, 1].

    The graph includes the scaling factor, quantization if the autoencoder has it, and the clamp.

    Args:
        autoencoder: An autoencoder of diffusers.
        divide: True divides the latents by the scaling factor, False multiplies them by its reciprocal. diffusers'
            pipelines differ in this, and a rounded bit can select another code of a quantized latent.
    """

    def __init__(self, autoencoder: nn.Module, divide: bool = False):
        super().__init__()
        config: Any = autoencoder.config
        self.autoencoder: Any = free_upsampling(autoencoder)
        quantizer: Any = getattr(autoencoder, "quantize", None)
        if quantizer is not None:
            self.autoencoder.quantize = Quantizer(quantizer)
        self.scaling_factor = float(config.scaling_factor)
        self.divide = divide

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Compute the outputs of the class's docstring."""
        scaled = latents / self.scaling_factor if self.divide else 1 / self.scaling_factor * latents
        image: torch.Tensor = self.autoencoder.decode(scaled, return_dict=False)[0]
        return (image / 2 + 0.5).clamp(0, 1)


class Encoder(nn.Module):
    """image float32 [B, channels, factor * h, factor * w] in [-1, 1] -> mean and deviation, float32 [B, C, h, w].

    These are the parameters of the normal distribution of the image's latents, multiplied by the scaling factor.

    Args:
        autoencoder: An AutoencoderKL of diffusers.
    """

    def __init__(self, autoencoder: nn.Module):
        super().__init__()
        config: Any = autoencoder.config
        self.autoencoder: Any = autoencoder
        self.scaling_factor = float(config.scaling_factor)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the outputs of the class's docstring."""
        distribution = self.autoencoder.encode(image, return_dict=False)[0]
        return self.scaling_factor * distribution.mean, self.scaling_factor * distribution.std


class _Upsample(nn.Module):
    """Upsample2D without branches on batch size and element count, which would fix these dimensions in a trace.

    Attributes:
        size: Height and width of the result if the caller does not pass ``output_size``; None doubles both sides.
    """

    def __init__(self, original: Upsample2D):
        super().__init__()
        self.conv: Any = original.conv if original.use_conv else nn.Identity()
        self.size: tuple[int, int] | None = None

    def forward(self, hidden_states: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        output_size = self.size if output_size is None else output_size
        factor = None if output_size is not None else 2.0
        result: torch.Tensor = self.conv(
            interpolate(hidden_states, size=output_size, scale_factor=factor, mode="nearest")
        )
        return result


def _upsample_to_skip_connections(unet: nn.Module) -> None:
    """Make a UNet2DModel upsample to the size of each skip connection instead of doubling the size.

    For multiples of the UNet's downsampling the result is the same; other sizes would not fit without this.
    """
    sizes: dict[int, Any] = {}
    down, up = list(unet.down_blocks), list(unet.up_blocks)  # type: ignore[arg-type]
    for level, block in enumerate(down):
        block.register_forward_pre_hook(partial(_remember_size, sizes, level), with_kwargs=True)
    for index, block in enumerate(up[:-1]):
        block.register_forward_pre_hook(partial(_use_size, sizes, len(down) - 2 - index), with_kwargs=True)


def _remember_size(
    sizes: dict[int, Any], level: int, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Store height and width of a down block's input under its level."""
    sample = named["hidden_states"] if "hidden_states" in named else given[0]
    sizes[level] = sample.shape[2:]


def _use_size(
    sizes: dict[int, Any], level: int, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Make an up block upsample to the size that was stored under a level."""
    alone = [one for one in getattr(block, "upsamplers", None) or () if isinstance(one, _Upsample)]
    for upsampler in (*alone, *_upsamplers(block)):
        upsampler.size = sizes[level]


class _Always:
    """An integer in place of a number of upsamplers, for which ``size % 2**n`` is never zero.

    A UNet then upsamples to the size of each skip connection. For multiples the result is the same, and for other
    sizes it is the only correct one.
    """

    def __rpow__(self, base: int) -> _Always:
        return self

    def __rmod__(self, size: int) -> int:
        return 1


def free_upsampling(module: nn.Module) -> nn.Module:
    """Make a diffusers model's upsampling traceable for any batch size and image size, with the same results.

    Some blocks upsample inside a residual block. Its branch on the batch size is avoided by using the upsampling as its
    downsampling, and the block sets its size before each call.
    """
    for name, child in list(module.named_children()):
        if _is_nearest(child) and child.use_conv:
            setattr(module, name, _Upsample(child))
        else:
            free_upsampling(child)
    if isinstance(module, ResnetBlock2D) and _is_nearest(module.upsample):
        module.downsample, module.upsample = _Upsample(module.upsample), None
    if _upsamplers(module):
        module.register_forward_pre_hook(_set_upsampled_size, with_kwargs=True)
    if hasattr(module, "num_upsamplers"):
        module.num_upsamplers = _Always()  # type: ignore[assignment]
    return module


def _is_nearest(module: Any) -> TypeGuard[Upsample2D]:
    """True if this is nearest upsampling, with or without a convolution, and nothing else."""
    return (
        isinstance(module, Upsample2D)
        and module.interpolate
        and not module.use_conv_transpose
        and module.norm is None
        and (not module.use_conv or module.name == "conv")
    )


def _upsamplers(block: nn.Module) -> list[_Upsample]:
    """Return the upsampling modules inside the residual blocks at the end of a block."""
    resnets = list(getattr(block, "upsamplers", None) or ())
    inside = [resnet.downsample for resnet in resnets if isinstance(resnet, ResnetBlock2D)]
    return [one for one in inside if isinstance(one, _Upsample)]


def _set_upsampled_size(block: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Pass the size of the skip connection, which diffusers passes only to the block, to its upsampling resnets."""
    for upsampler in _upsamplers(block):
        upsampler.size = keywords.get("upsample_size")
