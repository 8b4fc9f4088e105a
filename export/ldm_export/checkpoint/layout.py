"""Description of the checkpoint folders of a pipeline family: parts, class names, renames and torch modules.

Every family defines one ``CheckpointLayout``. The readers of this package depend on it and not on any family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["CheckpointLayout", "FileFolder", "ModuleSource", "Part", "WeightNames"]

Config = Mapping[str, Any]
"""Every argument of a class, by name."""


@dataclass(frozen=True)
class WeightNames:
    """Names of tensors in earlier releases.

    Attributes:
        patterns: (regular expression, replacement) pairs, applied in this order to names that the module does not have.
        renumber: Renames that depend on the config, applied before the patterns.
        matrices_as_convolutions: True if matrices may be stored as 1x1 convolutions, [out, in, 1, 1].
        ignored: Suffixes of tensors of earlier releases that no module has.
    """

    patterns: tuple[tuple[str, str], ...] = ()
    renumber: Callable[[str, Config], str] | None = None
    matrices_as_convolutions: bool = False
    ignored: tuple[str, ...] = ("position_ids",)


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint that a config describes: a model with weights, or a scheduler.

    Attributes:
        folders: Its keys in model_index.json, which are also folder names; the current name first.
        classes: Class name -> callable whose keyword arguments are the keys of the config.
        older_classes: Class name of an earlier release -> current name, a key of ``classes``.
        older_keys: Config key of an earlier release -> current key.
        current_config: Conversion beyond renaming keys. Called with the config after renaming and with the stored
            config. Raises CheckpointError for values that it cannot convert.
        config_file: Name of the config's file.
        weights: Names of tensors in earlier releases.
        construct: Creates the module from a full config; None calls the class of the checkpoint with it.
    """

    folders: tuple[str, ...]
    classes: Mapping[str, Callable[..., Any]]
    older_classes: Mapping[str, str] = field(default_factory=dict)
    older_keys: Mapping[str, str] = field(default_factory=dict)
    current_config: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    config_file: str = "config.json"
    weights: WeightNames = field(default_factory=WeightNames)
    construct: Callable[[Config], nn.Module] | None = None

    def module(self, class_name: str, config: Config) -> nn.Module:
        """Create the module of a full config, with random weights. Raises whatever the class raises."""
        if self.construct is not None:
            return self.construct(config)
        module: nn.Module = self.classes[class_name](**config)
        return module


@dataclass(frozen=True)
class ModuleSource:
    """A torch module that is loaded from a part of a checkpoint.

    Attributes:
        part: Name of the part with its config and weights.
        left_out: Submodule that is not loaded -> its replacement, or None. Its tensors may be missing.
    """

    part: str
    left_out: Mapping[str, Callable[[], nn.Module] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class FileFolder:
    """A folder of a checkpoint without weights, for example a tokenizer.

    Attributes:
        folders: As in ``Part``.
        one_of: File names of which at least one must exist, unless weights are random.
        published: Description of where to get the folder, for the message "give …" if it is missing.
        or_file: True if a file may be given instead of the folder.
    """

    folders: tuple[str, ...]
    one_of: tuple[str, ...]
    published: str = "the checkpoint's own"
    or_file: bool = False


@dataclass(frozen=True)
class CheckpointLayout:
    """Layout of the checkpoints of one family.

    Attributes:
        kind: Kind of the family's models for messages, e.g. "text-to-image".
        parts: Parts with weights by name.
        scheduler: Part of the scheduler.
        files: Folders of files by name.
        modules: Torch modules by name.
        not_exported: Key of a further part in model_index.json -> notice for checkpoints that have it.
        options: Key of a further option in model_index.json, true or false -> its default.
        refused: Key of a further option in model_index.json -> what a checkpoint is that sets it, and what to do.
        optional: Parts and files that a checkpoint may lack; without the folder of one, a warning says so.
        problems: Checks the full configs, by part, against each other and returns one phrase for each disagreement.
    """

    kind: str
    parts: Mapping[str, Part]
    scheduler: Part
    files: Mapping[str, FileFolder]
    modules: Mapping[str, ModuleSource]
    problems: Callable[[Mapping[str, Config]], list[str]]
    not_exported: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, bool] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
