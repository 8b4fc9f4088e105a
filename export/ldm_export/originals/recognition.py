"""Recognises kind, sizes and settings of a CompVis checkpoint, from its state dict, a yaml and published models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ldm_export.checkpoint.choices import WEIGHTS
from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.autoencoder_shape import AutoencoderShape, autoencoder_shape
from ldm_export.originals.clip_shape import Clip
from ldm_export.originals.condition_shape import (
    Condition,
    Labels,
    condition_shape,
    kind_of,
)
from ldm_export.originals.key_mapping import has_ema
from ldm_export.originals.published import STABLE_DIFFUSION_XL, Heads, Published, published_as
from ldm_export.originals.schedule import betas_of
from ldm_export.originals.unet_shape import UNetShape, unet_shape
from ldm_export.originals.yaml_config import YamlConfig
from ldm_export.originals.yaml_facts import yaml_facts
from ldm_export.originals.yaml_shapes import yaml_shapes
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import Defaults

__all__ = ["Original", "described", "recognise"]

V_PREDICTION, EDM = "v_pred", "edm_mean"
"""Tensors whose presence means that a Stable Diffusion XL model predicts velocity, or uses EDM's formulation."""
_DEFAULTS = {
    "text_to_image": Defaults(50, 0.0, 5.0),
    "stable_diffusion": Defaults(50, 0.0, 7.5),
    "stable_diffusion_xl": Defaults(50, 0.0, 5.0),
    "class_conditional": Defaults(20, 0.0, 3.0),
    "super_resolution": Defaults(100, 1.0, 1.0),
    "unconditional": Defaults(200, 0.0, 1.0),
}


@dataclass(frozen=True)
class Original:
    """Everything known about a CompVis checkpoint.

    Attributes:
        kind: One of ``condition_shape.KINDS``.
        name: Name of the published model with these sizes; "" if there is none.
        unet, autoencoder, condition: Sizes of the parts.
        heads: Attention heads of the UNet.
        image_size: Height and width of the latents with which the model was trained.
        scale_factor: Factor by which the encoder's latents are multiplied.
        timesteps, linear_start, linear_end: Training schedule.
        ema: True if the UNet's weights are the moving averages.
        unconditional: True if the last class of a class-conditional model is that of the unconditional branch.
        defaults: Sampling options.
        prediction_type: What the UNet predicts, as an option of diffusers' schedulers.
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
    prediction_type: str = "epsilon"


def recognise(
    tensors: Mapping[str, StoredTensor],
    config: YamlConfig | None = None,
    weights: str | None = None,
    prediction_type: str | None = None,
) -> Original:
    """Recognise a state dict.

    Args:
        tensors: The state dict; only a few small tensors of the schedule are read.
        config: The model's yaml. Without it, settings that tensors do not determine come from the published model with
            these sizes.
        weights: "ema" or "model"; None takes the moving averages if there are any and the yaml does not say
            ``use_ema: False``.
        prediction_type: What the UNet predicts, one of ``choices.PREDICTION_TYPES``; None takes what the yaml or the
            tensors say, else "epsilon". Stable Diffusion 2 needs it or a yaml.

    Raises:
        CheckpointError: The model is of an unknown kind, the yaml is that of another model, or a yaml is needed.
    """
    unet, autoencoder, condition = unet_shape(tensors), autoencoder_shape(tensors), condition_shape(tensors)
    kind = kind_of(unet, condition)
    if unet.out_channels != autoencoder.latent_channels:
        raise CheckpointError(
            f"checkpoint: the UNet predicts {unet.out_channels} channels, the autoencoder has "
            f"{autoencoder.latent_channels}; use the tensors of one model"
        )
    if kind == STABLE_DIFFUSION_XL.kind:
        _check_xl(tensors, config)
    if config is not None:
        config.check(yaml_facts(config, tensors, unet, autoencoder, condition))
    return _described((unet, autoencoder, condition), kind, tensors, config, weights, prediction_type)


def described(config: YamlConfig) -> Original:
    """Read everything about a model without weights from its yaml.

    Raises:
        CheckpointError: The model is of an unknown kind, or the yaml is incomplete.
    """
    shapes = yaml_shapes(config)
    return _described(shapes, kind_of(shapes[0], shapes[2]), {}, config, None, None)


def _described(
    shapes: tuple[UNetShape, AutoencoderShape, Condition | None],
    kind: str,
    tensors: Mapping[str, StoredTensor],
    config: YamlConfig | None,
    weights: str | None,
    given: str | None,
) -> Original:
    unet, autoencoder, condition = shapes
    prediction_type = _prediction_type(condition, tensors, config, given)
    row = published_as(kind, unet, prediction_type)
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
        prediction_type=prediction_type,
    )


def _check_xl(tensors: Mapping[str, StoredTensor], config: YamlConfig | None) -> None:
    if config is not None:
        raise CheckpointError(f"{config.file}: Stable Diffusion XL needs no yaml; leave --config out")
    if EDM in tensors:
        raise CheckpointError("checkpoint: a model in EDM's formulation, whose scheduler is not supported")


def _needs_config(what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: its tensors do not tell {what}, and no published model has these sizes; "
        "give the yaml that it was trained with (--config)"
    )


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
    if row is not None and row.prediction_type is not None:
        return row.image_size  # both yamls of Stable Diffusion 2 say 64
    if config is not None:
        size = config.integer(config.params, "image_size", 1, 4096) or config.integer(
            config.unet, "image_size", 1, 4096
        )
        if size is not None:
            return size
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
    betas = betas_of(tensors, linear)
    if betas is not None:
        return betas
    if linear is None:
        if row is None:
            raise _needs_config("its noise schedule")
        linear = row.betas
    return (steps, *linear)


def _scale_factor(tensors: Mapping[str, StoredTensor], config: YamlConfig | None, row: Published | None) -> float:
    stored = tensors.get("scale_factor")
    if stored is not None and stored.shape in ((), (1,)):
        factor = float(stored.read().reshape(()))
        if factor > 0:
            return factor
        raise CheckpointError(f"{stored.file}: tensor scale_factor: got {factor:g}, expected a positive number")
    if config is not None:
        if config.params.get("scale_by_std") is True and tensors:
            raise CheckpointError(
                f"{config.file}: scale_by_std is set, but the checkpoint has no tensor scale_factor; use a whole one"
            )
        return config.number(config.params, "scale_factor", 1e-6, 1e6) or 1.0
    if row is None:
        raise _needs_config("the scale of its latents")
    return row.scale_factor


def _prediction_type(
    condition: Condition | None, tensors: Mapping[str, StoredTensor], config: YamlConfig | None, given: str | None
) -> str:
    said, by = ("v_prediction", f"tensor {V_PREDICTION}") if V_PREDICTION in tensors else (None, "")
    if config is not None:
        said, by = _parameterization(config), str(config.file)
    if given is not None:
        if said not in (None, given):
            raise CheckpointError(f"checkpoint: got --prediction-type {given}, but {by} says {said}; leave it out")
        return given
    if said is None and isinstance(condition, Clip) and condition.open_clip:
        raise CheckpointError(
            "checkpoint: Stable Diffusion 2, whose tensors do not tell whether it predicts noise or velocity; give "
            "--prediction-type v_prediction for a model of 768 pixels, epsilon for one of 512, or its yaml (--config)"
        )
    return said or "epsilon"


def _parameterization(config: YamlConfig) -> str:
    kinds = {"eps": "epsilon", "v": "v_prediction"}
    stated = config.params.get("parameterization", "eps")
    if not isinstance(stated, str) or stated not in kinds:
        raise CheckpointError(f"{config.file}: parameterization: got {stated!r:.40}, expected {' or '.join(kinds)}")
    return kinds[stated]


def _unconditional(condition: Condition | None, row: Published | None) -> bool:
    """True if the last class is that of the unconditional branch.

    For a published model, its guidance scale decides. For others, neither checkpoint nor yaml says so; the number of
    classes decides, because data sets usually have a multiple of ten classes (ImageNet has 1000), to which one is
    added.
    """
    if not isinstance(condition, Labels):
        return False
    return condition.classes % 10 == 1 if row is None else row.defaults.guidance_scale != 1


def _ema(
    tensors: Mapping[str, StoredTensor], config: YamlConfig | None, row: Published | None, weights: str | None
) -> bool:
    if weights not in (None, *WEIGHTS):
        raise CheckpointError(f"weights: got {weights!r:.40}, expected one of {', '.join(WEIGHTS)}")
    averaged = has_ema(tensors)
    if weights == "ema" and not averaged:
        raise CheckpointError("weights: got ema, but the checkpoint has no moving averages; leave it out")
    if weights is not None:
        return weights == "ema"
    if config is not None:
        return averaged and config.params.get("use_ema", True) is not False
    return averaged and (row is None or row.use_ema)
