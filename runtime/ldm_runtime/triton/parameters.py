"""What a model's config.pbtxt tells the python backend: which graphs, on what, and how many at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_runtime.batching.limits import Limits
from ldm_runtime.errors import SpecError
from ldm_runtime.pipeline import LatentDiffusionPipeline

BUNDLE = "bundle"
"""Folder of a version that holds the bundle's files."""
IN_PROCESS, PER_STEP = "in_process", "per_step"
"""Where `ldm_stream` runs the UNet: in its own process, or by a call to the model `unet` at each step."""


@dataclass(frozen=True)
class Settings:
    """The ``parameters`` of a config.pbtxt; all are texts there, and empty where nothing is asked."""

    component: str = ""
    precision: str = ""
    backend: str = "auto"
    device: str = "auto"
    threads: str = ""
    rows: str = "32"
    call_rows: str = ""
    queue: str = "256"
    unet: str = IN_PROCESS

    @classmethod
    def of(cls, args: Mapping[str, str]) -> Settings:
        """From what Triton gives to ``initialize``."""
        given = json.loads(args["model_config"]).get("parameters", {})
        fields = {name: given[name]["string_value"] for name in cls.__dataclass_fields__ if name in given}
        return cls(**fields)

    def parameters(self) -> dict[str, Any]:
        """As a config.pbtxt holds them."""
        texts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: {"string_value": text} for name, text in texts.items() if text}

    @property
    def limits(self) -> Limits:
        """Of the engine room.

        Raises:
            SpecError: a number is none.
        """
        sizes = [_number("call_rows", text) for text in self.call_rows.split()]
        return Limits(_number("rows", self.rows), sizes or None, _number("queue", self.queue))

    def open(self, version: Path) -> LatentDiffusionPipeline:
        """The pipeline of a version's bundle; its files are checked, and loaded when they are used.

        Raises:
            LdmError: as ``LatentDiffusionPipeline.from_bundle``.
        """
        return LatentDiffusionPipeline.from_bundle(
            version / BUNDLE,
            precision=self.precision or None,
            backend=self.backend,
            device=self.device,
            threads=_number("threads", self.threads) if self.threads else None,
        )


def version_folder(args: Mapping[str, str]) -> Path:
    """The folder of the version that Triton loads."""
    return Path(args["model_repository"]) / args["model_version"]


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise SpecError(f"config.pbtxt: parameter {name}: got {text!r:.40}, expected a whole number; write it anew")
    return int(text)
