"""Collects the contents of a report: images of each precision, sizes, timings and the bundle's JSON reports."""

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

__all__ = ["REFERENCE", "PrecisionImages", "Report", "ReportOptions", "bundle_json", "make_report", "precisions"]

MAX_REQUESTS, MAX_BYTES = 100, 64 * 2**20
REFERENCE = "fp32"
ORDER = (REFERENCE, "fp16", "bf16", "int8")


@dataclass(frozen=True, eq=False)
class PrecisionImages:
    """Images and timings of one precision.

    Attributes:
        images: One per request; empty if the precision could not run.
        step: Median seconds of one denoising step.
        backend: The backend that ran it, with its arithmetic.
        failure: Reason why it could not run; empty if it ran.
    """

    images: tuple[Image.Image, ...] = ()
    step: float | None = None
    backend: str = ""
    failure: str | None = None


@dataclass(frozen=True)
class ReportOptions:
    """Options of the generated images: the first seed (image i has seed + i), denoising steps, and the backend."""

    seed: int = 0
    steps: int | None = None
    backend: str = "auto"


@dataclass(frozen=True, eq=False)
class Report:
    """Contents of a report.

    Attributes:
        bundle: The bundle that it describes.
        requests: A request for each image.
        options: Seed, steps and backend.
        results: Precision -> its images and timings; fp32 first.
        files: Path -> content of the bundle's JSON report files.
    """

    bundle: Bundle
    requests: tuple[RequestFields, ...]
    options: ReportOptions
    results: Mapping[str, PrecisionImages]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that have graphs of every precision of the report."""
        components = self.bundle.manifest.components
        return tuple(name for name, part in components.items() if all(one in part.graphs for one in self.results))

    def size(self, precision: str) -> int:
        """Bytes of a precision's graphs with their weights."""
        manifest = self.bundle.manifest
        graphs = {part.graphs[precision] for part in manifest.components.values() if precision in part.graphs}
        files = {file for graph in graphs for file in files_of_graph(graph, manifest.files)}
        return sum(manifest.files[file].size for file in files)

    def psnr(self, precision: str) -> tuple[float | None, ...]:
        """PSNR in dB of each image against that of fp32, None if equal; empty if a precision could not run."""
        pairs = zip(self.results[REFERENCE].images, self.results[precision].images, strict=False)
        return tuple(
            psnr(np.asarray(reference, np.float64), np.asarray(image, np.float64), 255.0) for reference, image in pairs
        )


def make_report(
    bundle: Bundle,
    requests: Sequence[RequestFields],
    options: ReportOptions | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Generate the requested images with each precision of the bundle, one after another, and read its report files.

    A precision that the backend cannot run on this machine is stated in the report and is not an error.

    Raises:
        SpecError: The pipeline does not take a request, the seed or the number of steps.
        ManifestError: The bundle is damaged.
    """
    options = options or ReportOptions()
    if not 1 <= len(requests) <= MAX_REQUESTS:
        raise SpecError(f"requests: got {len(requests)}, expected 1..{MAX_REQUESTS}")
    files = {name: bundle_json(bundle, name) for name in bundle.manifest.files if _is_report(name)}
    requests = _completed(bundle, requests)
    seeded = [
        Request(**one, seed=options.seed + i, num_inference_steps=options.steps) for i, one in enumerate(requests)
    ]
    available, results = precisions(bundle), {}
    for index, precision in enumerate(available):

        def advance(done: int, total: int, what: str = precision, before: int = index) -> None:
            on_progress(what, before * total + done, len(available) * total)

        results[precision] = _generate(bundle, precision, seeded, options.backend, advance)
    return Report(bundle, tuple(requests), options, results, files)


def _completed(bundle: Bundle, requests: Sequence[RequestFields]) -> Sequence[RequestFields]:
    """Fill in example values of the model's conditioning where requests have none."""
    try:
        with LatentDiffusionPipeline.from_bundle(bundle, precision=REFERENCE) as pipeline:
            return [{**pipeline.example(one), **one} for one in requests]
    except BackendError:  # each precision states it in the report
        return requests


def precisions(bundle: Bundle) -> list[str]:
    """Return the precisions in which the UNet and the decoder have graphs, fp32 first.

    Raises:
        ManifestError: There are no fp32 graphs to compare with.
    """
    parts = [bundle.manifest.components[name].graphs for name in (UNET, DECODER)]
    available = [precision for precision in parts[0] if all(precision in graphs for graphs in parts)]
    if REFERENCE not in available:
        raise ManifestError(f"{bundle.folder}: no {REFERENCE} graphs to compare with; rebuild the bundle")
    return sorted(
        available, key=lambda precision: (ORDER.index(precision) if precision in ORDER else len(ORDER), precision)
    )


def bundle_json(bundle: Bundle, name: str) -> Mapping[str, Any]:
    """Read one of the bundle's files as JSON, after checking it against the manifest.

    Raises:
        ManifestError: The file is damaged, larger than ``MAX_BYTES``, or not a JSON object.
    """
    size = bundle.manifest.files[name].size
    if size > MAX_BYTES:
        raise ManifestError(f"{bundle.folder / name}: {size} bytes, expected at most {MAX_BYTES}; rebuild the bundle")
    try:
        content = json.loads(bundle.file(name).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{bundle.folder / name}: not valid JSON ({error}); rebuild the bundle") from None
    if not isinstance(content, dict):
        raise ManifestError(
            f"{bundle.folder / name}: got {type(content).__name__}, expected an object; rebuild the bundle"
        )
    return content


def _is_report(name: str) -> bool:
    return name.startswith("report/") and name.endswith(".json")


def _generate(
    bundle: Bundle,
    precision: str,
    requests: Sequence[Request],
    backend: str,
    on_progress: Callable[[int, int], None],
) -> PrecisionImages:
    images, seconds, ran = list[Image.Image](), list[float](), backend
    try:
        with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend=backend) as pipeline:
            for index, request in enumerate(requests):
                begun = time.perf_counter()
                for step in pipeline.steps(request):
                    seconds.append(time.perf_counter() - begun)
                    on_progress(index * step.total + step.index + 1, len(requests) * step.total)
                    begun = time.perf_counter()
                images += _decoded(pipeline, step.latents, request)
            if pipeline.choice:  # "auto" may have replaced it
                ran = f"{pipeline.choice.backend}, computing in {pipeline.choice.arithmetic}"
    except BackendError as error:
        return PrecisionImages(backend=ran, failure=str(error))
    return PrecisionImages(tuple(images), median(seconds), ran)


def _decoded(
    pipeline: LatentDiffusionPipeline, latents: np.ndarray[Any, np.dtype[np.float32]], request: Request
) -> list[Image.Image]:
    try:
        return pipeline.generation(latents, request).images
    except SpecError as error:  # NaN is a result of the precision, like an engine that fails
        raise BackendError(str(error)) from None
