"""Reads and checks the configs of a checkpoint folder, before any weights are read."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldm_export.checkpoint.config_values import full_config, with_current_names
from ldm_export.checkpoint.json_files import read_json, shortened
from ldm_export.checkpoint.layout import CheckpointLayout, Part
from ldm_export.checkpoint.lone_parts import lone_part
from ldm_export.checkpoint.weights import StoredTensor, read_weights, weight_file
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import Defaults

__all__ = ["INDEX", "Change", "Checkpoint", "Component", "read_folder", "read_index"]

log = logging.getLogger(__name__)

INDEX = "model_index.json"
Change = Callable[[torch.Tensor], torch.Tensor]
"""Computes the new values of a parameter, float32, from those that were read."""


@dataclass(frozen=True)
class Component:
    """A part of a checkpoint with weights.

    Attributes:
        name: Name of the part.
        folder: Its folder, or the file with the weights of all parts.
        class_name: Name of its class.
        config: Every argument of that class, with defaults filled in.
        defaulted: Arguments that the checkpoint does not give.
        tensors: Name -> tensor, if the weights are not in files of the folder but under other names in a single file.
        depends: Everything besides the files of ``folder`` on which the weights depend, as JSON values.
        ignored: Entries of the checkpoint's config that are not arguments of the class.
        changes: Parameter of the module -> changes to its values, in the order in which they are applied.
    """

    name: str
    folder: Path
    class_name: str
    config: Mapping[str, Any]
    defaulted: frozenset[str] = frozenset()
    tensors: Mapping[str, StoredTensor] | None = field(default=None, repr=False)
    depends: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, Any] = field(default_factory=dict, repr=False)
    changes: tuple[Mapping[str, Change], ...] = field(default=(), repr=False)

    def weights(self) -> Mapping[str, StoredTensor]:
        """Return name -> tensor; values are read from disk when they are used. Errors as ``read_weights``."""
        return read_weights(self.folder, self.name) if self.tensors is None else self.tensors


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose configs have been checked. Weights have not been read yet.

    Attributes:
        folder: The checkpoint's folder.
        family: Name of the checkpoint's family.
        layout: Checkpoint layout of the family.
        components: Part -> its class and config, for parts with weights.
        files: Name, e.g. "tokenizer" -> folder of files.
        scheduler_config: Every argument of diffusers' scheduler class, and the name of the class under "class".
        random_seed: Seed of random weights; None reads the weights from the files.
        defaults: Sampling options of the checkpoint's authors; None for the defaults of the family.
        options: Values of the layout's options in the checkpoint.
        embeddings: Added files of textual inversion: name, SHA-256 and token of each.
        added_tokens: Tokenizer -> tokens that these files add to it, in order.
        loras: LoRA files to merge into the weights: name, SHA-256 and scale of each.
        scheduler_given: Entries of the scheduler's config in the checkpoint, including options of other schedulers.
    """

    folder: Path
    family: str
    layout: CheckpointLayout
    components: Mapping[str, Component]
    files: Mapping[str, Path]
    scheduler_config: Mapping[str, Any]
    random_seed: int | None = None
    defaults: Defaults | None = None
    scheduler_given: Mapping[str, Any] = field(default_factory=dict, repr=False)
    options: Mapping[str, bool] = field(default_factory=dict)
    loras: tuple[Mapping[str, Any], ...] = ()
    embeddings: tuple[Mapping[str, Any], ...] = ()
    added_tokens: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def configs(self) -> dict[str, Mapping[str, Any]]:
        """Part -> its full config."""
        return {name: component.config for name, component in self.components.items()}


def read_index(folder: Path) -> dict[str, Any]:
    """Read model_index.json.

    Raises:
        CheckpointError: The folder is missing or empty, or has no such file.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is {'a file' if folder.exists() else 'missing'}, expected a checkpoint folder")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty, expected a checkpoint with {INDEX} and its components")
    if not (folder / INDEX).exists() and (found := lone_part(folder)) is not None:
        raise CheckpointError(f"{folder} holds {found}, expected a whole checkpoint with {INDEX}; give its folder")
    return read_json(folder / INDEX, "checkpoint")


def read_folder(
    folder: Path, index: dict[str, Any], family: str, layout: CheckpointLayout, random_seed: int | None
) -> Checkpoint:
    """Read and check the configs of a checkpoint. With a ``random_seed``, weight files are not needed.

    Raises:
        CheckpointError: A folder or file is missing, a class or an option is not supported, or a config is damaged, has
            values of a wrong type or size, or does not fit the other parts.
    """
    for key, what in layout.refused.items():
        if index.get(key) is True:
            raise CheckpointError(f"{folder / INDEX}: {key}: got true: {what}")
    lacking = _lacking(folder, index, layout)
    parts = {name: part for name, part in layout.parts.items() if name not in lacking}
    components = {name: _component(folder, index, name, part) for name, part in parts.items()}
    if problems := layout.problems({name: component.config for name, component in components.items()}):
        raise CheckpointError(f"{folder}: {problems[0]}; use the components of one {layout.kind} checkpoint")
    scheduler = _component(folder, index, "scheduler", layout.scheduler)
    wanted = {name: entry for name, entry in layout.files.items() if name not in lacking}
    files = {name: _entry(folder, index, name, entry.folders)[0] for name, entry in wanted.items()}
    if random_seed is None:
        for component in components.values():
            weight_file(component.folder, component.name)
        for name, entry in wanted.items():
            if not any((files[name] / file).is_file() for file in entry.one_of):
                raise CheckpointError(f"{name}: no {' or '.join(entry.one_of)} in {files[name]}; download it whole")
    for key, notice in layout.not_exported.items():
        if isinstance(index.get(key), list) and None not in index[key]:
            log.warning("%s: %s: %s", folder, key, notice)
    config = {**scheduler.config, "class": scheduler.class_name}
    given = {key: value for key, value in scheduler.config.items() if key not in scheduler.defaulted}
    given |= scheduler.ignored
    options = {key: _option(folder, index, key, default) for key, default in layout.options.items()}
    return Checkpoint(folder, family, layout, components, files, config, random_seed, None, given, options)


def _lacking(folder: Path, index: dict[str, Any], layout: CheckpointLayout) -> frozenset[str]:
    """Return the optional parts and files that are missing in a checkpoint."""
    lacking = set()
    for name in sorted(layout.optional):
        listed = isinstance(index.get(name), list) and None not in index[name]
        if not listed or not (folder / name).is_dir():
            lacking.add(name)
            if listed:
                log.warning("%s: folder %s is missing, so that it is not exported", name, folder / name)
    return frozenset(lacking)


def _option(folder: Path, index: dict[str, Any], key: str, default: bool) -> bool:
    value = index.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{folder / INDEX}: {key}: got {value!r:.40}, expected true or false; correct it")
    return value


def _entry(folder: Path, index: dict[str, Any], name: str, keys: tuple[str, ...]) -> tuple[Path, str]:
    """Return the folder of a part, and its class according to model_index.json."""
    where = folder / INDEX
    key = next((key for key in keys if key in index), None)
    if key is None:
        raise CheckpointError(f"{name}: {where} has no {' or '.join(keys)}; download the checkpoint whole")
    entry = index[key]
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise CheckpointError(f'{name}: {where}: got "{key}": {entry!r}, expected [library, class]')
    if not (folder / key).is_dir():
        raise CheckpointError(f"{name}: folder {folder / key} is missing; download the checkpoint whole")
    return folder / key, entry[1]


def _component(folder: Path, index: dict[str, Any], name: str, part: Part) -> Component:
    place, class_name = _entry(folder, index, name, part.folders)
    file = place / part.config_file
    stored = read_json(file, name)
    today = _current_class(part, class_name)
    for listed in (class_name, stored.get("_class_name", class_name)):
        if _current_class(part, listed) not in tuple(part.classes) or _current_class(part, listed) != today:
            expected = f"{class_name} as in {INDEX}" if today in part.classes else " or ".join(part.classes)
            raise CheckpointError(f"{name}: {file}: got class {listed!r}, expected {expected}; no other is supported")
    config = with_current_names(part, {key: value for key, value in stored.items() if not key.startswith("_")})
    full = full_config(f"{name}: {file}", part, today, config)
    if unknown := set(config) - set(full):
        log.info("%s: %s: ignored %s", name, file, shortened(unknown))
    ignored = {key: value for key, value in config.items() if key not in full}
    return Component(name, place, today, full, frozenset(set(full) - set(config)), ignored=ignored)


def _current_class(part: Part, name: Any) -> Any:
    return part.older_classes.get(name, name) if isinstance(name, str) else name
