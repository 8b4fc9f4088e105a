"""Sizes of a CompVis model from its yaml, for models with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_export.originals.autoencoder_shape import AutoencoderShape
from ldm_export.originals.condition_shape import Classes, Condition, Labels, Text
from ldm_export.originals.unet_shape import UNetShape
from ldm_export.originals.yaml_config import YamlConfig
from ldm_runtime.errors import CheckpointError

__all__ = ["yaml_shapes"]

TEXT_TOKENS, VOCABULARY, TEXT_HEADS = 77, 30522, 8
"""Default sizes of BERTEmbedder."""


def yaml_shapes(config: YamlConfig) -> tuple[UNetShape, AutoencoderShape, Condition | None]:
    """Return the sizes of UNet, autoencoder and conditioning encoder.

    Raises:
        CheckpointError: A number is missing that the authors' yamls have, or a number is out of range.
    """
    return _unet(config), _autoencoder(config), _condition(config)


def _number(config: YamlConfig, values: Mapping[str, Any], key: str) -> int:
    number = config.integer(values, key)
    if number is None:
        raise CheckpointError(f"{config.file}: has no {key}, which the sizes of a model without weights derive from")
    return number


def _numbers(config: YamlConfig, values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    numbers = config.integers(values, key)
    if numbers is None:
        raise CheckpointError(f"{config.file}: has no {key}, which the sizes of a model without weights derive from")
    return numbers


def _unet(config: YamlConfig) -> UNetShape:
    values = config.unet
    width = _number(config, values, "model_channels")
    widths = tuple(width * multiple for multiple in _numbers(config, values, "channel_mult"))
    attended = _numbers(config, values, "attention_resolutions")
    context = config.integer(values, "context_dim")
    return UNetShape(
        in_channels=_number(config, values, "in_channels"),
        out_channels=_number(config, values, "out_channels"),
        model_channels=width,
        widths=widths,
        res_blocks=_number(config, values, "num_res_blocks"),
        attention=tuple(2**level in attended for level in range(len(widths))),
        context_width=context,
        depth=1 if context is None else config.integer(values, "transformer_depth") or 1,
        resblock_updown=values.get("resblock_updown") is True,
        scale_shift=values.get("use_scale_shift_norm") is True,
        linear=values.get("use_linear_in_transformer") is True,
    )


def _autoencoder(config: YamlConfig) -> AutoencoderShape:
    stage = config.first_stage
    given = stage.get("ddconfig")
    values: Mapping[str, Any] = given if isinstance(given, dict) else {}
    width = _number(config, values, "ch")
    widths = tuple(width * multiple for multiple in _numbers(config, values, "ch_mult"))
    resolution, attended = _number(config, values, "resolution"), _numbers(config, values, "attn_resolutions")
    return AutoencoderShape(
        in_channels=_number(config, values, "in_channels"),
        out_channels=_number(config, values, "out_ch"),
        widths=widths,
        res_blocks=_number(config, values, "num_res_blocks"),
        attention=tuple(resolution // 2**level in attended for level in range(len(widths))),
        mid_attention=values.get("attn_type") != "none",
        z_channels=_number(config, values, "z_channels"),
        latent_channels=_number(config, stage, "embed_dim"),
        codes=config.integer(stage, "n_embed"),
    )


def _condition(config: YamlConfig) -> Condition | None:
    values = config.condition
    if "n_classes" in values:
        return Labels(_number(config, values, "n_classes"), _number(config, values, "embed_dim"))
    if "n_layer" in values:
        width = _number(config, values, "n_embed")
        return Text(
            vocabulary=config.integer(values, "vocab_size") or VOCABULARY,
            tokens=config.integer(values, "max_seq_len") or TEXT_TOKENS,
            width=width,
            layers=_number(config, values, "n_layer"),
            heads=TEXT_HEADS,
            feed_forward=4 * width,
        )
    if "n_stages" in values:
        return Classes(_number(config, values, "in_channels"), _number(config, values, "out_channels"))
    return None
