"""Contents of a report: images drawn with each precision of a bundle, sizes, timings and the bundle's own reports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ldm_export.requests import RequestFields
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import files_of_graph
from ldm_runtime.errors import BackendError, ManifestError, SpecError
from ldm_runtime.images import psnr
from ldm_runtime.model import DECODER, UNET
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request

MAX_REQUESTS, MAX_BYTES = 100, 64 * 2**20
REFERENCE = "fp32"
ORDER = (REFERENCE, "fp16", "bf16", "int8")


@dataclass(frozen=True, eq=False)
class PrecisionImages:
    """What one precision drew.

    Attributes:
        images: One per request; none if it could not be run.
        step: Median seconds of one denoising step.
        backend: What ran it.
        failure: Why it could not be run.
    """

    images: tuple[Image.Image, ...] = ()
    step: float | None = None
    backend: str = ""
    failure: str | None = None


@dataclass(frozen=True)
class ReportOptions:
    """What a report draws: the first seed (image i has seed + i), denoising steps, and the backend."""

    seed: int = 0
    steps: int | None = None
    backend: str = "auto"


@dataclass(frozen=True, eq=False)
class Report:
    """What a report shows.

    Attributes:
        bundle: What it is about.
        requests: One per image.
        options: Seed, steps and backend.
        drawn: Precision -> what it drew; fp32 first.
        files: Path -> content of the bundle's JSON report files.
    """

    bundle: Bundle
    requests: tuple[RequestFields, ...]
    options: ReportOptions
    drawn: Mapping[str, PrecisionImages]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that have graphs of every precision of the report."""
        held = self.bundle.manifest.components
        return tuple(name for name, part in held.items() if all(one in part.graphs for one in self.drawn))

    def size(self, precision: str) -> int:
        """Bytes of a precision's graphs with their weights."""
        manifest = self.bundle.manifest
        graphs = {part.graphs[precision] for part in manifest.components.values() if precision in part.graphs}
        files = {file for graph in graphs for file in files_of_graph(graph, manifest.files)}
        return sum(manifest.files[file].size for file in files)

    def psnr(self, precision: str) -> tuple[float | None, ...]:
        """PSNR in dB of each image against fp32's, None if they are equal; empty if either was not drawn."""
        pairs = zip(self.drawn[REFERENCE].images, self.drawn[precision].images, strict=False)
        return tuple(
            psnr(np.asarray(reference, np.float64), np.asarray(image, np.float64), 255.0) for reference, image in pairs
        )


def make_report(
    bundle: Bundle,
    requests: Sequence[RequestFields],
    options: ReportOptions | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Draw the requests with each precision of the bundle, one after another, and read its report files.

    A precision that the backend cannot run on this machine is stated in the report and is not an error.

    Raises:
        SpecError: A request, seed or number of steps that the pipeline does not take.
        ManifestError: The bundle is damaged.
    """
    options = options or ReportOptions()
    if not 1 <= len(requests) <= MAX_REQUESTS:
        raise SpecError(f"requests: got {len(requests)}, expected 1..{MAX_REQUESTS}")
    files = {name: read_json(bundle, name) for name in bundle.manifest.files if _is_report(name)}
    seeded = [
        Request(**one, seed=options.seed + i, num_inference_steps=options.steps) for i, one in enumerate(requests)
    ]
    held, drawn = precisions(bundle), {}
    for index, precision in enumerate(held):

        def advance(done: int, total: int, what: str = precision, before: int = index) -> None:
            on_progress(what, before * total + done, len(held) * total)

        drawn[precision] = _draw(bundle, precision, seeded, options.backend, advance)
    return Report(bundle, tuple(requests), options, drawn, files)


def precisions(bundle: Bundle) -> list[str]:
    """Precisions in which the UNet and the decoder have graphs, fp32 first.

    Raises:
        ManifestError: There are no fp32 graphs to compare with.
    """
    parts = [bundle.manifest.components[name].graphs for name in (UNET, DECODER)]
    held = [precision for precision in parts[0] if all(precision in graphs for graphs in parts)]
    if REFERENCE not in held:
        raise ManifestError(f"{bundle.folder}: no {REFERENCE} graphs to compare with; rebuild the bundle")
    return sorted(held, key=lambda precision: (ORDER.index(precision) if precision in ORDER else len(ORDER), precision))


def read_json(bundle: Bundle, name: str) -> Mapping[str, Any]:
    """Read one of the bundle's files as JSON, after checking it against the manifest.

    Raises:
        ManifestError: Damaged, larger than ``MAX_BYTES``, or not a JSON object.
    """
    size = bundle.manifest.files[name].size
    if size > MAX_BYTES:
        raise ManifestError(f"{bundle.folder / name}: {size} bytes, expected at most {MAX_BYTES}; rebuild the bundle")
    try:
        found = json.loads(bundle.file(name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{bundle.folder / name}: not valid JSON ({error}); rebuild the bundle") from None
    if not isinstance(found, dict):
        raise ManifestError(
            f"{bundle.folder / name}: got {type(found).__name__}, expected an object; rebuild the bundle"
        )
    return found


def _is_report(name: str) -> bool:
    return name.startswith("report/") and name.endswith(".json")


def _draw(
    bundle: Bundle,
    precision: str,
    requests: Sequence[Request],
    backend: str,
    on_progress: Callable[[int, int], None],
) -> PrecisionImages:
    images, seconds, ran = list[Image.Image](), list[float](), backend
    try:
        with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend=backend) as pipeline:
            if pipeline.choice:
                ran = f"{pipeline.choice.backend}, computing in {pipeline.choice.arithmetic}"
            for index, request in enumerate(requests):
                begun = time.perf_counter()
                for step in pipeline.steps(request):
                    seconds.append(time.perf_counter() - begun)
                    on_progress(index * step.total + step.index + 1, len(requests) * step.total)
                    begun = time.perf_counter()
                images += _decoded(pipeline, step.latents)
    except BackendError as error:
        return PrecisionImages(backend=ran, failure=str(error))
    return PrecisionImages(tuple(images), median(seconds), ran)


def _decoded(pipeline: LatentDiffusionPipeline, latents: np.ndarray[Any, np.dtype[np.float32]]) -> list[Image.Image]:
    try:
        return pipeline.decode(latents)
    except SpecError as error:  # NaN is a finding about the precision, as is an engine that fails
        raise BackendError(str(error)) from None
