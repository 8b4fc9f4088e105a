"""The request for engines, and the job of building one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm_runtime.bundle import Bundle
from ldm_runtime.spec_json import spec_from_json, spec_to_json
from ldm_runtime.specs import ComponentSpec

__all__ = ["Bounds", "EngineJob", "EngineRequest"]

Bounds = tuple[int, int, int]
"""Smallest, usual and largest size."""


@dataclass(frozen=True)
class EngineRequest:
    """The package, GPUs and shapes that engines are built for.

    Attributes:
        target: "tensorrt-rtx" or "tensorrt".
        compute_capabilities: E.g. ("8.6", "8.9"). Empty for "tensorrt", which builds for the GPU of this machine.
        bounds: (axis name, bounds): "batch" in images, "height" and "width" in latents, and "chunks" in chunks of a
            prompt.
        rows_per_image: UNet rows per image: the number of guidance branches, 1 without guidance.
        refittable: True if weights can be replaced later without rebuilding. Building such engines needs a GPU.
        version_compatible: True builds plans that later versions and TensorRT's lean runtime also run. For "tensorrt"
            only.
        timings: Timing cache, a file of kernel timings that later builds reuse. For "tensorrt" only.
    """

    target: str
    compute_capabilities: tuple[str, ...] = ()
    bounds: tuple[tuple[str, Bounds], ...] = ()
    rows_per_image: int = 1
    refittable: bool = False
    version_compatible: bool = False
    timings: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Short name for file names, e.g. ``tensorrt-rtx-8.6-8.9``."""
        return "-".join((self.target, *self.compute_capabilities))


@dataclass(frozen=True)
class EngineJob:
    """Everything that the build of one engine needs.

    Attributes:
        graph: ONNX file. External weights lie beside it.
        spec: Inputs and outputs of the component.
        precision: Precision of the graph: "fp32", "fp16", "bf16" or "int8".
        request: Package, GPUs and shapes of the engine.
        target: File to write.
        islands: Names of the graph's matrix nodes that stay in fp32 on purpose.
        previous: An earlier bundle, whose engine may be refitted with the graph's weights.
    """

    graph: Path
    spec: ComponentSpec
    precision: str
    request: EngineRequest
    target: Path
    islands: tuple[str, ...] = ()
    previous: Bundle | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the description as JSON values, with the folder of the bundle."""
        return {
            "graph": str(self.graph),
            "spec": {"name": self.spec.name, **spec_to_json(self.spec)},
            "precision": self.precision,
            "request": asdict(self.request),
            "target": str(self.target),
            "islands": list(self.islands),
            "previous": None if self.previous is None else str(self.previous.folder),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> EngineJob:
        """Read the result of ``to_json``.

        Raises:
            ManifestError: The bundle of an earlier build is damaged.
        """
        request, spec, previous = document["request"], document["spec"], document["previous"]
        bounds = tuple((name, tuple(sizes)) for name, sizes in request["bounds"])
        capabilities = tuple(request["compute_capabilities"])
        return cls(
            graph=Path(document["graph"]),
            spec=spec_from_json("spec", spec["name"], spec),
            precision=document["precision"],
            request=EngineRequest(**{**request, "bounds": bounds, "compute_capabilities": capabilities}),
            target=Path(document["target"]),
            islands=tuple(document["islands"]),
            previous=None if previous is None else Bundle.open(previous),
        )
