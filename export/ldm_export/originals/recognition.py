"""Recognises a CompVis checkpoint: its kind, sizes and settings, from the state dict, a yaml and the published rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.autoencoder_shape import AUTOENCODER_PREFIX, AutoencoderShape, autoencoder_shape
from ldm_export.originals.condition_shape import (
    CONDITION_PREFIX,
    Classes,
    Condition,
    Labels,
    Text,
    condition_shape,
    kind_of,
)
from ldm_export.originals.key_mapping import has_ema
from ldm_export.originals.published import Heads, Published, published_as
from ldm_export.originals.schedule import betas_of
from ldm_export.originals.unet_shape import UNET_PREFIX, UNetShape, unet_shape
from ldm_export.originals.yaml_config import YamlConfig
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import Defaults

__all__ = ["WEIGHTS", "Original", "recognise"]

WEIGHTS = ("ema", "model")
"""Choices of the UNet's weights: moving averages, or the plain ones."""
_DEFAULTS = {
    "text_to_image": Defaults(50, 0.0, 5.0),
    "class_conditional": Defaults(20, 0.0, 3.0),
    "super_resolution": Defaults(100, 1.0, 1.0),
    "unconditional": Defaults(200, 0.0, 1.0),
}


@dataclass(frozen=True)
class Original:
    """Everything known about a CompVis checkpoint.

    Attributes:
        kind: One of ``condition_shape.KINDS``.
        name: Of the published model with these sizes; "" if there is none.
        unet, autoencoder, condition: Sizes.
        heads: Of the UNet's attention.
        image_size: Height and width of the latents the model was trained with.
        scale_factor: The latents are the encoder's times this.
        timesteps, linear_start, linear_end: Training schedule.
        ema: The UNet's weights are the moving averages.
        unconditional: The last class of a class-conditional model is that of the unconditional branch.
        defaults: Sampling options.
    """

    kind: str
    name: str
    unet: UNetShape
    autoencoder: AutoencoderShape
    condition: Condition | None
    heads: Heads
    image_size: int
    scale_factor: float
    timesteps: int
    linear_start: float
    linear_end: float
    ema: bool
    unconditional: bool
    defaults: Defaults


def recognise(
    tensors: Mapping[str, StoredTensor], config: YamlConfig | None = None, weights: str | None = None
) -> Original:
    """Recognise a state dict.

    Args:
        tensors: The state dict; only a few small tensors of the schedule are read.
        config: The model's yaml. Without one, what tensors do not tell comes from the published model of these sizes.
        weights: "ema" or "model"; None takes the moving averages if there are any and the yaml does not say
            ``use_ema: False``.

    Raises:
        CheckpointError: The model is of no known kind, its yaml is another model's, or a yaml is needed.
    """
    unet, autoencoder, condition = unet_shape(tensors), autoencoder_shape(tensors), condition_shape(tensors)
    kind = kind_of(unet, condition, tensors)
    if unet.out_channels != autoencoder.latent_channels:
        raise CheckpointError(
            f"checkpoint: the UNet predicts {unet.out_channels} channels, the autoencoder has "
            f"{autoencoder.latent_channels}; use the tensors of one model"
        )
    if config is not None:
        config.check(_facts(config, tensors, unet, autoencoder, condition))
    row = published_as(kind, unet)
    timesteps, start, end = _schedule(tensors, config, row)
    return Original(
        kind=kind,
        name="" if row is None else row.name,
        unet=unet,
        autoencoder=autoencoder,
        condition=condition,
        heads=_heads(config, row, unet),
        image_size=_image_size(config, row),
        scale_factor=_scale_factor(tensors, config, row),
        timesteps=timesteps,
        linear_start=start,
        linear_end=end,
        ema=_ema(tensors, config, row, weights),
        unconditional=_unconditional(condition, row),
        defaults=row.defaults if row is not None else _DEFAULTS.get(kind, Defaults()),
    )


def _needs_config(what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: its tensors do not tell {what}, and no published model has these sizes; "
        "give the yaml that it was trained with (--config)"
    )


def _facts(
    config: YamlConfig,
    tensors: Mapping[str, StoredTensor],
    unet: UNetShape,
    autoencoder: AutoencoderShape,
    condition: Condition | None,
) -> list[tuple[str, Any, Any, str]]:
    """Keys of a yaml, their values, what the state dict says and the tensor that says so."""

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


def _heads(config: YamlConfig | None, row: Published | None, unet: UNetShape) -> Heads:
    if config is not None:
        order = config.unet.get("use_new_attention_order") is True
        number = config.number(config.unet, "num_heads", -1, 4096)
        channels = config.number(config.unet, "num_head_channels", -1, 2**16)
        if channels is not None and channels > 0:
            return Heads(channels=int(channels), new_order=order)
        if number is not None and number > 0:
            return Heads(number=int(number), new_order=order)
        raise CheckpointError(f"{config.file}: unet_config has no num_heads or num_head_channels above 0; correct it")
    if row is None:
        raise _needs_config("how many attention heads it has")
    return row.heads


def _image_size(config: YamlConfig | None, row: Published | None) -> int:
    if config is not None:
        found = config.integer(config.params, "image_size", 1, 4096) or config.integer(
            config.unet, "image_size", 1, 4096
        )
        if found is not None:
            return found
    if row is None:
        raise _needs_config("the size of its latents")
    return row.image_size


def _schedule(
    tensors: Mapping[str, StoredTensor], config: YamlConfig | None, row: Published | None
) -> tuple[int, float, float]:
    linear, steps = None, 1000
    if config is not None:
        start, end = (config.number(config.params, key, 1e-9, 0.999) for key in ("linear_start", "linear_end"))
        linear = (1e-4 if start is None else start, 2e-2 if end is None else end)  # the defaults of CompVis' DDPM
        steps = config.integer(config.params, "timesteps", 2, 100_000) or 1000
    found = betas_of(tensors, linear)
    if found is not None:
        return found
    if linear is None:
        if row is None:
            raise _needs_config("its noise schedule")
        linear = row.betas
    return (steps, *linear)


def _scale_factor(tensors: Mapping[str, StoredTensor], config: YamlConfig | None, row: Published | None) -> float:
    stored = tensors.get("scale_factor")
    if stored is not None and stored.shape in ((), (1,)):
        found = float(stored.read().reshape(()))
        if found > 0:
            return found
        raise CheckpointError(f"{stored.file}: tensor scale_factor: got {found:g}, expected a positive number")
    if config is not None:
        if config.params.get("scale_by_std") is True:
            raise CheckpointError(
                f"{config.file}: scale_by_std is set, but the checkpoint has no tensor scale_factor; use a whole one"
            )
        return config.number(config.params, "scale_factor", 1e-6, 1e6) or 1.0
    if row is None:
        raise _needs_config("the scale of its latents")
    return row.scale_factor


def _unconditional(condition: Condition | None, row: Published | None) -> bool:
    """True if the last class is the unconditional one.

    A published model tells by its guidance scale. For others nothing in a checkpoint or yaml tells; the number of
    classes decides, since data sets have even tens of classes (1000 of ImageNet) and one more is added to them.
    """
    if not isinstance(condition, Labels):
        return False
    return condition.classes % 10 == 1 if row is None else row.defaults.guidance_scale != 1


def _ema(
    tensors: Mapping[str, StoredTensor], config: YamlConfig | None, row: Published | None, weights: str | None
) -> bool:
    if weights not in (None, *WEIGHTS):
        raise CheckpointError(f"weights: got {weights!r:.40}, expected one of {', '.join(WEIGHTS)}")
    found = has_ema(tensors)
    if weights == "ema" and not found:
        raise CheckpointError("weights: got ema, but the checkpoint has no moving averages; leave it out")
    if weights is not None:
        return weights == "ema"
    if config is not None:
        return found and config.params.get("use_ema", True) is not False
    return found and (row is None or row.use_ema)
