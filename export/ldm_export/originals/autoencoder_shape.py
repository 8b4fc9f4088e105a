"""Sizes of a CompVis autoencoder, from the names and shapes of its tensors (``AutoencoderKL``, ``VQModel``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.unet_shape import count, shape_of
from ldm_runtime.errors import CheckpointError

__all__ = ["AUTOENCODER_PREFIX", "AutoencoderShape", "autoencoder_shape"]

AUTOENCODER_PREFIX = "first_stage_model."


@dataclass(frozen=True)
class AutoencoderShape:
    """Sizes of an autoencoder, derived from its state dict.

    Attributes:
        in_channels, out_channels: Channels of the images.
        widths: Channels of each level.
        res_blocks: Number of residual blocks in each level of the encoder; the decoder has one more.
        attention: For each level, whether it has attention.
        mid_attention: True if the middle block has attention.
        z_channels: Channels between encoder and ``quant_conv``.
        latent_channels: Channels of the latents.
        codes: Number of codes of a quantized latent; None for a KL autoencoder.
    """

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    res_blocks: int
    attention: tuple[bool, ...]
    mid_attention: bool
    z_channels: int
    latent_channels: int
    codes: int | None

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return int(2 ** (len(self.widths) - 1))

    @property
    def class_name(self) -> str:
        """Diffusers' class."""
        return "AutoencoderKL" if self.codes is None else "VQModel"

    def config(self, sample_size: int, scaling_factor: float) -> dict[str, Any]:
        """Arguments of that class; ``sample_size`` is in pixels."""
        attended = ["Attn" if attention else "" for attention in self.attention]
        config: dict[str, Any] = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in attended],
            "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(attended)],
            "block_out_channels": list(self.widths),
            "layers_per_block": self.res_blocks,
            "latent_channels": self.z_channels,
            "sample_size": sample_size,
            "scaling_factor": scaling_factor,
            "mid_block_add_attention": self.mid_attention,
        }
        if self.codes is not None:
            config |= {"num_vq_embeddings": self.codes, "vq_embed_dim": self.latent_channels}
        return config


def autoencoder_shape(tensors: Mapping[str, StoredTensor]) -> AutoencoderShape:
    """Derive the sizes of the autoencoder in a state dict.

    Raises:
        CheckpointError: There is none, or it has an unknown form.
    """
    prefix = AUTOENCODER_PREFIX
    levels = count(tensors, f"{prefix}encoder.down.{{}}")
    widths = tuple(shape_of(tensors, f"{prefix}encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
    latent, z_channels = shape_of(tensors, f"{prefix}post_quant_conv.weight", 4)[1::-1]
    codebook = f"{prefix}quantize.embedding.weight"
    if not widths or (codebook not in tensors and latent != z_channels):
        raise CheckpointError(
            f"checkpoint: {prefix}: got {levels} levels, {latent} latent and {z_channels} z channels, expected at "
            "least one level and, without a codebook, equal channels"
        )
    return AutoencoderShape(
        in_channels=shape_of(tensors, f"{prefix}encoder.conv_in.weight", 4)[1],
        out_channels=shape_of(tensors, f"{prefix}decoder.conv_out.weight", 4)[0],
        widths=widths,
        res_blocks=count(tensors, f"{prefix}encoder.down.0.block.{{}}"),
        attention=tuple(f"{prefix}encoder.down.{i}.attn.0.norm.weight" in tensors for i in range(levels)),
        mid_attention=f"{prefix}decoder.mid.attn_1.norm.weight" in tensors,
        z_channels=z_channels,
        latent_channels=latent,
        codes=shape_of(tensors, codebook, 2)[0] if codebook in tensors else None,
    )
