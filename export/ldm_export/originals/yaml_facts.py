"""Facts about a model that both its yaml and its state dict contain, for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.autoencoder_shape import AUTOENCODER_PREFIX, AutoencoderShape
from ldm_export.originals.condition_shape import CONDITION_PREFIX, Classes, Condition, Labels, Text
from ldm_export.originals.unet_shape import UNET_PREFIX, UNetShape
from ldm_export.originals.yaml_config import YamlConfig

__all__ = ["yaml_facts"]


def yaml_facts(
    config: YamlConfig,
    tensors: Mapping[str, StoredTensor],
    unet: UNetShape,
    autoencoder: AutoencoderShape,
    condition: Condition | None,
) -> list[tuple[str, Any, Any, str]]:
    """Return keys of a yaml with their values, the values in the state dict, and the tensors that determine these."""

    def seen(name: str) -> str:
        return f"{name} {list(tensors[name].shape)}" if name in tensors else f"the absence of {name}"

    conv_in, block = seen(f"{UNET_PREFIX}input_blocks.0.0.weight"), f"the blocks of {UNET_PREFIX}input_blocks"
    cross = seen(f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    ae_in, ae_out = (seen(f"{AUTOENCODER_PREFIX}{name}.weight") for name in ("encoder.conv_in", "post_quant_conv"))
    given, conv_out = config.unet, seen(f"{UNET_PREFIX}out.2.weight")
    dd = given_dd if isinstance(given_dd := config.first_stage.get("ddconfig"), dict) else {}
    resolutions = config.integers(given, "attention_resolutions")
    relevant = None if resolutions is None else tuple(sorted(r for r in resolutions if r < 2 ** len(unet.widths)))
    multiples = config.integers(dd, "ch_mult")
    ch = config.integer(dd, "ch")
    levels = None if ch is None or multiples is None else tuple(ch * multiple for multiple in multiples)
    facts: list[tuple[str, Any, Any, str]] = [
        ("unet model_channels", config.integer(given, "model_channels"), unet.model_channels, conv_in),
        ("unet in_channels", config.integer(given, "in_channels"), unet.in_channels, conv_in),
        ("unet out_channels", config.integer(given, "out_channels"), unet.out_channels, conv_out),
        ("unet channel_mult", config.integers(given, "channel_mult"), unet.multiples, block),
        ("unet num_res_blocks", config.integer(given, "num_res_blocks"), unet.res_blocks, block),
        ("unet attention_resolutions", relevant, unet.attention_resolutions, block),
        ("unet context_dim", config.integer(given, "context_dim"), unet.context_width, cross),
        ("unet resblock_updown", bool(given.get("resblock_updown", False)), unet.resblock_updown, block),
        ("unet use_scale_shift_norm", bool(given.get("use_scale_shift_norm", False)), unet.scale_shift,
         seen(f"{UNET_PREFIX}input_blocks.1.0.emb_layers.1.weight")),
        ("unet use_linear_in_transformer", bool(given.get("use_linear_in_transformer", False)), unet.linear, cross),
        ("autoencoder embed_dim", config.integer(config.first_stage, "embed_dim"), autoencoder.latent_channels, ae_out),
        ("autoencoder n_embed", config.integer(config.first_stage, "n_embed"), autoencoder.codes,
         seen(f"{AUTOENCODER_PREFIX}quantize.embedding.weight")),
        ("autoencoder z_channels", config.integer(dd, "z_channels"), autoencoder.z_channels, ae_out),
        ("autoencoder num_res_blocks", config.integer(dd, "num_res_blocks"), autoencoder.res_blocks,
         f"the blocks of {AUTOENCODER_PREFIX}encoder.down.0"),
        ("autoencoder ch and ch_mult", levels, autoencoder.widths, ae_in),
    ]  # fmt: skip
    if isinstance(condition, Text):
        tokens = seen(f"{CONDITION_PREFIX}transformer.token_emb.weight")
        facts += [
            ("text n_embed", config.integer(config.condition, "n_embed"), condition.width, tokens),
            ("text vocab_size", config.integer(config.condition, "vocab_size"), condition.vocabulary, tokens),
            ("text n_layer", config.integer(config.condition, "n_layer"), condition.layers, "the layers of "
             f"{CONDITION_PREFIX}transformer.attn_layers"),
        ]  # fmt: skip
    if isinstance(condition, Labels):
        embedding = seen(f"{CONDITION_PREFIX}embedding.weight")
        facts += [
            ("labels n_classes", config.integer(config.condition, "n_classes"), condition.classes, embedding),
            ("labels embed_dim", config.integer(config.condition, "embed_dim"), condition.width, embedding),
        ]
    if isinstance(condition, Classes):
        mapper = seen(f"{CONDITION_PREFIX}channel_mapper.weight")
        stages = config.integer(config.condition, "n_stages")
        multiplier = config.number(config.condition, "multiplier", 0.0, 1.0)
        halvings = autoencoder.factor.bit_length() - 1
        facts += [
            ("segmentation in_channels", config.integer(config.condition, "in_channels"), condition.classes, mapper),
            ("segmentation out_channels", config.integer(config.condition, "out_channels"), condition.channels, mapper),
            ("segmentation n_stages", stages, halvings, f"{autoencoder.factor} pixels per latent"),
            ("segmentation multiplier", multiplier, 0.5, "the number of stages"),
            ("segmentation method", config.condition.get("method"), "bilinear", "the published models"),
        ]
    return facts
