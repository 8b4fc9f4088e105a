"""Opens an original checkpoint file as a ``Checkpoint``, like a diffusers folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_export.checkpoint.config_values import full_config
from ldm_export.checkpoint.folder import Checkpoint, Component
from ldm_export.checkpoint.layout import CheckpointLayout, Part
from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.families import family_named
from ldm_export.originals.checkpoint_file import read_state_dict
from ldm_export.originals.clip_shape import Clip, ClipPair, clip_tensors
from ldm_export.originals.condition_shape import KINDS, Classes, Labels, Text
from ldm_export.originals.ddim_scheduler import CompVisDDIMScheduler
from ldm_export.originals.key_mapping import (
    autoencoder_tensors,
    condition_tensors,
    text_tensors,
    unet_tensors,
)
from ldm_export.originals.other_files import other_file
from ldm_export.originals.recognition import Original, described, recognise
from ldm_export.originals.schedule import scheduler_options
from ldm_export.originals.unet_config import added_config, unet_class, unet_config, unet_part
from ldm_export.originals.yaml_config import read_yaml
from ldm_runtime.conditioning.layout import read_categories
from ldm_runtime.errors import CheckpointError

__all__ = ["open_original", "open_yaml"]

log = logging.getLogger(__name__)


def open_original(
    file: Path,
    config: Path | None = None,
    tokenizer: Path | None = None,
    weights: str | None = None,
    categories: Path | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Open a checkpoint file of CompVis/latent-diffusion.

    Args:
        file: A file of ``torch.save`` or safetensors.
        config: The yaml with which the model was trained; not needed for models with the sizes of a published one.
        tokenizer: For models of texts: a ``vocab.txt`` of BERT, or a folder with it or a ``tokenizer.json``. The
            published models use the vocabulary of bert-base-uncased.
        weights: "ema" or "model"; see ``recognition.recognise``.
        categories: For models of layouts: a text file with one category name per line, in the order of their numbers.
            Without it, requests use numbers of categories.
        prediction_type: "epsilon" or "v_prediction"; see ``recognition.recognise``.

    Raises:
        CheckpointError: The file is damaged or not a known model, the yaml is needed or is that of another model, or
            the tokenizer is missing.
    """
    tensors = read_state_dict(file)
    if (other := other_file(tensors)) is not None:
        raise CheckpointError(
            f"{file} holds {other}, expected a whole model of {', '.join(KINDS)}; give its checkpoint file or folder"
        )
    try:
        original = recognise(tensors, None if config is None else read_yaml(config), weights, prediction_type)
        if original.kind == "super_resolution" and original.scale_factor != 1:
            raise CheckpointError(f"checkpoint: got scale_factor {original.scale_factor:g}, expected 1 of this kind")
        log.info("%s: %s %s, ema %s", file, original.kind, original.name, original.ema)
        layout = _layout(original)
        components = _components(file, original, layout, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {str(error).removeprefix('checkpoint: ')}") from None
    files = {**_tokenizer(file, layout, tokenizer), **_categories(file, layout, categories)}
    return _checkpoint(file, original, layout, components, files)


def open_yaml(file: Path, seed: int = 0) -> Checkpoint:
    """Open a yaml of CompVis/latent-diffusion as a checkpoint with random weights.

    Raises:
        CheckpointError: The yaml is damaged, incomplete, or for an unknown kind of model.
    """
    try:
        original = described(read_yaml(file))
        layout = _layout(original)
        components = _components(file, original, layout, None)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {str(error).removeprefix(f'{file}: ').removeprefix('checkpoint: ')}") from None
    files = {"tokenizer": file / "tokenizer"} if "tokenizer" in layout.files else {}
    return replace(_checkpoint(file, original, layout, components, files), random_seed=seed)


def _checkpoint(
    file: Path,
    original: Original,
    layout: CheckpointLayout,
    components: Mapping[str, Component],
    files: Mapping[str, Path],
) -> Checkpoint:
    if problems := layout.problems({name: component.config for name, component in components.items()}):
        raise CheckpointError(f"{file}: {problems[0]}; use the tensors of one model")
    options = scheduler_options(original.timesteps, original.linear_start, original.linear_end)
    options["prediction_type"] = original.prediction_type
    scheduler = full_config(f"scheduler: {file}", layout.scheduler, "DDIMScheduler", options)
    return Checkpoint(
        folder=file,
        family=original.kind,
        layout=layout,
        components=components,
        files=files,
        scheduler_config={**scheduler, "class": "DDIMScheduler"},
        scheduler_given=options,
        defaults=original.defaults,
        options=dict(layout.options),
    )


def _layout(original: Original) -> CheckpointLayout:
    """The family's layout, with the model's number of attention heads, and with DDIM on the timesteps of CompVis."""
    layout = family_named(original.kind).layout
    part = unet_part(layout.parts["unet"], original.unet, original.heads)
    scheduler = replace(layout.scheduler, classes={"DDIMScheduler": CompVisDDIMScheduler})
    return replace(layout, parts={**layout.parts, "unet": part}, scheduler=scheduler)


def _components(
    file: Path, original: Original, layout: CheckpointLayout, tensors: Mapping[str, StoredTensor] | None
) -> dict[str, Component]:
    """Return the parts of the layout with their configs and tensors."""
    unet, autoencoder, heads = original.unet, original.autoencoder, original.heads
    pixels = original.image_size * autoencoder.factor
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "unet": (unet_class(unet), unet_config(unet, heads, original.image_size)),
        "autoencoder": (autoencoder.class_name, autoencoder.config(pixels, original.scale_factor)),
    }
    condition = original.condition
    if isinstance(condition, Text):
        encoder = "layout_encoder" if original.kind == "layout_to_image" else "text_encoder"
        made[encoder] = ("LDMBertModel", condition.config())
    elif isinstance(condition, Clip):
        made["text_encoder"] = ("CLIPTextModel", condition.config())
    elif isinstance(condition, ClipPair):
        first, second = condition.first.config(), condition.second.config()
        made["text_encoder"] = ("CLIPTextModel", first)
        made["text_encoder_2"] = ("CLIPTextModelWithProjection", second)
        made["unet"][1].update(added_config(unet, second["projection_dim"]))
    elif isinstance(condition, Labels):
        made["label_encoder"] = ("ClassEmbedder", condition.config(original.unconditional))
    elif isinstance(condition, Classes):
        made["segmentation_encoder"] = ("SpatialRescaler", condition.config(autoencoder.factor))
    weights = None if tensors is None else _weights(original, tensors)
    return {
        name: _component(
            file, name, layout.parts[name], original, *made[name], None if weights is None else weights[name]
        )
        for name in layout.parts
        if name not in layout.optional
    }


def _weights(original: Original, tensors: Mapping[str, StoredTensor]) -> dict[str, Mapping[str, StoredTensor]]:
    """Return part -> its tensors under the names of its module."""
    condition = original.condition
    if isinstance(condition, ClipPair):
        texts, texts_2 = (clip_tensors(tensors, clip) for clip in (condition.first, condition.second))
    else:
        texts = clip_tensors(tensors, condition) if isinstance(condition, Clip) else text_tensors(tensors)
        texts_2 = {}
    return {
        "unet": unet_tensors(tensors, original.unet, original.heads, original.ema),
        "autoencoder": autoencoder_tensors(tensors),
        "text_encoder": texts,
        "text_encoder_2": texts_2,
        "layout_encoder": texts,
        "label_encoder": condition_tensors(tensors, "embedding."),
        "segmentation_encoder": condition_tensors(tensors, "channel_mapper."),
    }


def _component(
    file: Path,
    name: str,
    part: Part,
    original: Original,
    class_name: str,
    config: dict[str, Any],
    tensors: Mapping[str, StoredTensor] | None,
) -> Component:
    full = full_config(f"{name}: {file}", part, class_name, config)
    depends = {"config": {key: repr(value) for key, value in full.items()}}
    if name == "unet":
        depends["unet"] = {"heads": repr(original.heads), "ema": repr(original.ema)}
    named = None if tensors is None else {key: replace(one, component=name) for key, one in tensors.items()}
    return Component(name, file, class_name, full, frozenset(), named, depends)


def _categories(file: Path, layout: CheckpointLayout, categories: Path | None) -> dict[str, Path]:
    if categories is None:
        return {}
    if "categories" not in layout.files:
        raise CheckpointError(f"categories: got {categories}, but {file} is not a layout-to-image model; leave it out")
    read_categories(categories, CheckpointError)
    return {"categories": categories}


def _tokenizer(file: Path, layout: CheckpointLayout, tokenizer: Path | None) -> dict[str, Path]:
    if "tokenizer" not in layout.files:
        if tokenizer is not None:
            raise CheckpointError(
                f"tokenizer: got {tokenizer}, but {file} is not a model with text conditioning; leave it out"
            )
        return {}
    entry = layout.files["tokenizer"]
    if tokenizer is None:
        raise CheckpointError(f"{file}: the file holds no tokenizer; give {entry.published} (--tokenizer)")
    alone = entry.or_file and tokenizer.is_file()
    if not alone and not any((tokenizer / name).is_file() for name in entry.one_of):
        names = " or ".join(entry.one_of)
        raise CheckpointError(f"tokenizer: {tokenizer}: no {names}, expected {entry.published}; check the path")
    return {name: tokenizer for name in ("tokenizer", "tokenizer_2") if name in layout.files}
