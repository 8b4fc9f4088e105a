"""The ``parameters`` of a model's config.pbtxt: the component or bundle to load, engine options and limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_runtime.backends import Backend
from ldm_runtime.backends.factory import open_component
from ldm_runtime.batching.limits import Limits
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.loras.sets import DEFAULT_SELECTIONS
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["BUNDLE", "IN_PROCESS", "PER_STEP", "ModelParameters", "bundle_folder"]

BUNDLE = "bundle"
"""Folder of a model version that holds the bundle's files."""
IN_PROCESS, PER_STEP = "in_process", "per_step"
"""Values of ``unet``: `ldm_stream` runs the UNet in its own process, or calls the model `unet` at each step."""
MAX_DIGITS = 18


@dataclass(frozen=True)
class ModelParameters:
    """Parameters of one model. All are strings, as in config.pbtxt; an empty string means the default.

    Attributes:
        component: Name of the component, for a model that serves one component.
        precision, backend, device, threads: As ``LatentDiffusionPipeline.from_bundle``.
        lora_selections: As ``LatentDiffusionPipeline.from_bundle``.
        max_rows, row_buckets, max_queue: As in ``Limits``; the buckets are separated by spaces.
        unet: ``IN_PROCESS`` or ``PER_STEP``.
    """

    component: str = ""
    precision: str = ""
    backend: str = "auto"
    device: str = "auto"
    threads: str = ""
    max_rows: str = "32"
    row_buckets: str = ""
    max_queue: str = "256"
    lora_selections: str = str(DEFAULT_SELECTIONS)
    unet: str = IN_PROCESS

    @classmethod
    def from_args(cls, args: Mapping[str, str]) -> ModelParameters:
        """Read the parameters from the argument of a model's ``initialize``."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        fields = {name: parameters[name]["string_value"] for name in cls.__dataclass_fields__ if name in parameters}
        return cls(**fields)

    def to_config(self) -> dict[str, Any]:
        """The map field ``parameters`` of a config.pbtxt."""
        texts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: {"string_value": text} for name, text in texts.items() if text}

    @property
    def limits(self) -> Limits:
        """Limits of the batch scheduler.

        Raises:
            SpecError: A parameter is not a number, or out of range.
        """
        buckets = [_number("row_buckets", text) for text in self.row_buckets.split()]
        max_rows, max_queue = _number("max_rows", self.max_rows), _number("max_queue", self.max_queue)
        return Limits(max_rows=max_rows, row_buckets=buckets or None, max_queue=max_queue)

    def open_pipeline(self, bundle: Bundle) -> LatentDiffusionPipeline:
        """Open the bundle's pipeline; its files are checked now and loaded on first use.

        Raises:
            LdmError: As ``LatentDiffusionPipeline.from_bundle``.
        """
        return LatentDiffusionPipeline.from_bundle(
            bundle,
            precision=self.precision or None,
            backend=self.backend,
            device=self.device,
            threads=self._threads,
            lora_selections=_number("lora_selections", self.lora_selections),
        )

    def open_component(self, bundle: Bundle) -> Backend:
        """Open ``component`` alone; the files of the other components are not read.

        Raises:
            LdmError: As ``open_pipeline``; or the bundle has no such component.
        """
        return open_component(
            bundle,
            self.component,
            precision=self.precision or None,
            backend=self.backend,
            device=self.device,
            threads=self._threads,
        )

    @property
    def _threads(self) -> int | None:
        return _number("threads", self.threads) if self.threads else None


def bundle_folder(args: Mapping[str, str]) -> Path:
    """The bundle in the model version that Triton loads, from the argument of ``initialize``."""
    return Path(args["model_repository"]) / args["model_version"] / BUNDLE


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise SpecError(
            f"config.pbtxt: parameter {name}: got {text!r:.40}, expected a whole number; write the repository again"
        )
    return int(text)
