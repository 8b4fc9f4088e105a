"""The content of ``manifest.json``: model, graphs, engines, files and build stages of a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ldm_runtime.engine_facts import EngineFacts
from ldm_runtime.model import ConditioningSpec, Defaults, Latents, ModelDescription
from ldm_runtime.spec_json import spec_to_json
from ldm_runtime.specs import ComponentSpec

__all__ = ["FORMAT", "VERSION", "Component", "FileFact", "LoraFact", "Manifest", "StageFact"]

FORMAT, VERSION = "ldm-export bundle", 2


@dataclass(frozen=True)
class FileFact:
    """SHA-256 (hex) and size in bytes of one file of the bundle."""

    sha256: str
    size: int


@dataclass(frozen=True)
class StageFact:
    """One stage of the build: a digest of everything it depends on, and the files it wrote."""

    key: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Component:
    """One component of the model in a bundle: its spec, graphs and engines.

    Attributes:
        spec: Inputs and outputs.
        graphs: Precision -> path of the ONNX graph.
        engines: TensorRT engines.
        variants: Name of a variant, e.g. "onnxruntime-cpu" -> precision -> path of the graph rewritten for that engine.
    """

    spec: ComponentSpec
    graphs: Mapping[str, str]
    engines: tuple[EngineFacts, ...] = ()
    variants: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def graph(self, precision: str, variant: str = "") -> str | None:
        """Path of the graph for an engine: its variant if there is one, else the portable graph, else None."""
        return self.variants.get(variant, {}).get(precision) or self.graphs.get(precision)


@dataclass(frozen=True)
class LoraFact:
    """A LoRA adapter that requests can select.

    Attributes:
        file: Path of its factors, a safetensors file.
        layers: Part of the checkpoint, e.g. "unet" -> number of its layers that the adapter changes.
        source: Name of the file that it was added from.
    """

    file: str
    layers: Mapping[str, int]
    source: str


@dataclass(frozen=True)
class Manifest:
    """Content of a bundle's manifest. Paths are relative and have forward slashes.

    Attributes:
        family: Pipeline family, e.g. "text_to_image".
        components: Name -> component.
        conditioning, guidance, latents, scheduler, defaults, guidance_above_one: As in ``ModelDescription``.
        files: Every file of the bundle except the manifest itself and the build log.
        stages: What each stage of the build depended on and wrote.
        tools: Versions of the packages that built the bundle.
        request: Options of the build.
        measured: Results of measurements, e.g. of ``verify``.
        loras: Adapters by name.
    """

    family: str
    components: Mapping[str, Component]
    conditioning: tuple[ConditioningSpec, ...]
    guidance: tuple[str, ...]
    latents: Latents
    scheduler: Mapping[str, Any]
    files: Mapping[str, FileFact]
    defaults: Defaults = field(default_factory=Defaults)
    stages: Mapping[str, StageFact] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    request: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    guidance_above_one: bool = False
    loras: Mapping[str, LoraFact] = field(default_factory=dict)

    @property
    def model(self) -> ModelDescription:
        """Description of the model for the runtime."""
        specs = {name: component.spec for name, component in self.components.items()}
        parts = (self.conditioning, self.guidance, self.latents, self.scheduler, self.defaults, self.guidance_above_one)
        return ModelDescription(self.family, specs, *parts)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, indentation of two spaces, a final newline. Equal manifests give equal bytes."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "family": self.family,
            "components": {
                name: {
                    **spec_to_json(part.spec),
                    "graphs": dict(part.graphs),
                    "engines": [engine.to_json() for engine in part.engines],
                    "variants": {engine: dict(graphs) for engine, graphs in part.variants.items()},
                }
                for name, part in self.components.items()
            },
            "order": list(self.components),
            "conditioning": [asdict(entry) for entry in self.conditioning],
            "guidance": list(self.guidance),
            "guidance_above_one": self.guidance_above_one,
            "latents": asdict(self.latents),
            "scheduler": dict(self.scheduler),
            "defaults": asdict(self.defaults),
            "files": {path: {"sha256": fact.sha256, "size": fact.size} for path, fact in self.files.items()},
            "stages": {name: {"key": stage.key, "files": list(stage.files)} for name, stage in self.stages.items()},
            "tools": dict(self.tools),
            "request": dict(self.request),
            "measured": dict(self.measured),
            "loras": {name: asdict(lora) for name, lora in self.loras.items()},
        }
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
