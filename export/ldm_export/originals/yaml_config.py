"""The yaml with which a CompVis model was trained: reads it safely, and compares it with the state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ldm_runtime.errors import CheckpointError

__all__ = ["YamlConfig", "read_yaml"]

MAX_BYTES = 2**20


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """The safe loader without aliases, because with aliases a small file can describe a huge document."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class YamlConfig:
    """The parameters of a model.

    Attributes:
        file: Path of the yaml.
        params: ``model.params``.
        unet, first_stage, condition: Parameters of the parts; empty if the yaml names no class for a part.
    """

    file: Path
    params: Mapping[str, Any] = field(repr=False)
    unet: Mapping[str, Any] = field(repr=False)
    first_stage: Mapping[str, Any] = field(repr=False)
    condition: Mapping[str, Any] = field(repr=False)

    def number(self, values: Mapping[str, Any], key: str, low: float, high: float) -> float | None:
        """Return the number under a key; None if there is none.

        Raises:
            CheckpointError: The value is not a number from ``low`` to ``high``.
        """
        value = values.get(key)
        if value is None:
            return None
        try:  # 1e-4 without a point is a text in YAML 1.1
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            number = None
        if number is None or not low <= number <= high:
            raise CheckpointError(f"{self.file}: {key}: got {value!r:.60}, expected a number from {low:g} to {high:g}")
        return number

    def integer(self, values: Mapping[str, Any], key: str, low: int = 1, high: int = 2**24) -> int | None:
        """Return the whole number under a key; None if there is none. Raises CheckpointError for other values."""
        number = self.number(values, key, low, high)
        if number is not None and number != int(number):
            raise CheckpointError(f"{self.file}: {key}: got {number:g}, expected a whole number")
        return None if number is None else int(number)

    def integers(self, values: Mapping[str, Any], key: str) -> tuple[int, ...] | None:
        """Return a list of at most 32 whole numbers; None if there is none. Raises CheckpointError for other values."""
        value = values.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > 32 or not all(type(number) is int for number in value):
            raise CheckpointError(f"{self.file}: {key}: got {value!r:.60}, expected a list of whole numbers")
        return tuple(value)

    def check(self, facts: Sequence[tuple[str, Any, Any, str]]) -> None:
        """Compare the yaml with the state dict.

        Args:
            facts: Key of the yaml, its value or None if it is missing, the value in the state dict, and the tensor
                (with its shape) that determines it.

        Raises:
            CheckpointError: They disagree; the message lists every key.
        """
        wrong = [
            f"{key} is {configured}, but {actual} by {evidence}"
            for key, configured, actual, evidence in facts
            if configured is not None and configured != actual
        ]
        if wrong:
            raise CheckpointError(
                f"{self.file}: {'; '.join(wrong)}; give the yaml that the checkpoint was trained with"
            )


def read_yaml(file: Path) -> YamlConfig:
    """Read a model's yaml.

    Raises:
        CheckpointError: The file cannot be read, is not YAML, is too large, or does not describe a latent diffusion
            model.
    """
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{file}: {size} bytes, expected at most {MAX_BYTES}; give the model's yaml")
        document = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{file}: not valid YAML ({cause:.160}); give the model's yaml") from None
    params = _params(_mapping(document).get("model"))
    if not params.get("unet_config"):
        raise CheckpointError(f"{file}: has no model.params.unet_config, expected a latent diffusion model's yaml")
    parts = (_params(params.get(key)) for key in ("unet_config", "first_stage_config", "cond_stage_config"))
    return YamlConfig(file, params, *parts)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _params(value: Any) -> dict[str, Any]:
    return _mapping(_mapping(value).get("params"))
