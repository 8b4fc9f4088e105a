"""The model to calibrate: its description, its fp32 graphs and the files of its conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm_calibration.graph_files import files_of, load_graph
from ldm_calibration.inputs import loaded
from ldm_calibration.sessions import LARGE, Session, SessionBackend
from ldm_runtime.backends import Backend
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.geometry import Geometry
from ldm_runtime.model import ModelDescription
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request
from ldm_runtime.specs import ComponentSpec

__all__ = ["CalibrationModel", "FeedBatch", "ImageRequest", "request_fields"]

ImageRequest = Mapping[str, Any]
"""Fields of ``Request`` for one image, e.g. {"prompts": "a red circle"}: JSON values, or an ``InputFile``."""
MAX_LATENT_PIXELS = 2048
"""Maximum latent pixels of all images in one call: several images of a small model, or one of a large model."""
SAMPLING_FIELDS = {
    "count",
    "seed",
    "eta",
    "guidance_scale",
    "num_inference_steps",
    "images_per_prompt",
    "latents",
    "cache_every",
    "full_steps",
    "budget",
}
"""Fields of ``Request`` that the calibration sets itself or does not use, or that have no JSON value."""
_MERGED = "prompts"


def request_fields() -> frozenset[str]:
    """Names of the fields that a calibration request may have."""
    return frozenset(field.name for field in fields(Request)) - SAMPLING_FIELDS


@dataclass(frozen=True)
class FeedBatch:
    """Requests of several images in one call: fields of ``Request``, and the index of each image."""

    fields: Mapping[str, Any]
    indices: tuple[int, ...]

    def request(self, first_seed: int, **sampling: Any) -> Request:
        """Build a request whose image ``i`` has the seed ``first_seed + i``; ``sampling`` sets further fields."""
        return Request(**self.fields, seed=[first_seed + index for index in self.indices], **sampling)


@dataclass(frozen=True)
class CalibrationModel:
    """A model and its fp32 files.

    Attributes:
        model: Description of the model, as in the manifest.
        graphs: Component -> fp32 graph, for every component that the pipeline runs.
        files: Returns the path of a file that a conditioning names, e.g. "tokenizer.json".
    """

    model: ModelDescription
    graphs: Mapping[str, Path]
    files: Callable[[str], Path]

    def spec(self, component: str) -> ComponentSpec:
        """Inputs and outputs of a component."""
        return self.model.components[component]

    def pipeline(
        self, changed: Mapping[str, Backend] | None = None, *, keep_loaded: bool | None = None
    ) -> LatentDiffusionPipeline:
        """Open a pipeline of the fp32 graphs on ONNX Runtime's CPU provider.

        Components are loaded on use.

        Args:
            changed: Backends that replace those of the fp32 graphs.
            keep_loaded: False frees each component after its use. None: only if the weights of all graphs together
                exceed ``LARGE`` bytes.
        """
        backends = {name: self.backend(name) for name in self.graphs} | dict(changed or {})
        if keep_loaded is None:
            size = sum(file.stat().st_size for graph in self.graphs.values() for file in files_of(graph))
            keep_loaded = size <= LARGE
        return LatentDiffusionPipeline(self.model, backends, self.files, keep_loaded=keep_loaded)

    def backend(self, component: str) -> Backend:
        """Return a backend for a component's fp32 graph, which is loaded on use."""
        graph, spec = self.graphs[component], self.spec(component)
        return LazyBackend(spec, lambda: SessionBackend(Session(load_graph(graph), graph.parent), spec))

    def batch_size(self) -> int:
        """Number of images in one call."""
        geometry = Geometry.of(self.model)
        return max(1, min(geometry.images, MAX_LATENT_PIXELS // (geometry.height.opt * geometry.width.opt)))

    def batches(self, requests: Sequence[ImageRequest]) -> list[FeedBatch]:
        """Combine requests into calls of up to ``batch_size`` images.

        Consecutive requests share a call if they differ only in ``prompts``. Requests without prompts share a call only
        if the model has no conditioning.
        """
        feed_batches: list[FeedBatch] = []
        start, size = 0, self.batch_size()
        while start < len(requests):
            stop = start + 1
            while stop < min(start + size, len(requests)) and self._combine(requests[start], requests[stop]):
                stop += 1
            feed_batches.append(FeedBatch(self._completed(requests[start:stop]), tuple(range(start, stop))))
            start = stop
        return feed_batches

    def _completed(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        """Return the fields of a call, with images instead of files, and example values for missing conditioning."""
        fields = loaded(self._combined(requests))
        with self.pipeline() as pipeline:
            return {**pipeline.example(fields), **fields}

    def _combine(self, one: ImageRequest, other: ImageRequest) -> bool:
        same = one.keys() == other.keys() and all(one[name] == other[name] for name in one if name != _MERGED)
        return same and (_MERGED in one or not self.model.conditioning)

    def _combined(self, requests: Sequence[ImageRequest]) -> dict[str, Any]:
        shared = {name: value for name, value in requests[0].items() if name != _MERGED}
        if _MERGED in requests[0]:
            return shared | {_MERGED: [request[_MERGED] for request in requests]}
        return shared if self.model.conditioning else shared | {"count": len(requests)}
