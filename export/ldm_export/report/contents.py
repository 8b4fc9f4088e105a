"""All that a bundle can tell of its precisions: pictures drawn with each, sizes, seconds, and what its files report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, ManifestError, SpecError
from ldm_runtime.images import psnr
from ldm_runtime.manifest import COMPONENTS
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request

MAX_PROMPTS, MAX_BYTES = 100, 64 * 2**20
REFERENCE = "fp32"
ORDER = (REFERENCE, "fp16", "bf16", "int8")


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one precision drew.

    Attributes:
        images: one for each prompt; none where it could not be run.
        step: median seconds of one denoising step.
        backend: what ran it.
        failure: why it could not be run.
    """

    images: tuple[Image.Image, ...] = ()
    step: float | None = None
    backend: str = ""
    failure: str | None = None


@dataclass(frozen=True, eq=False)
class Report:
    """What a report shows.

    Attributes:
        bundle: what it is about.
        prompts: one for each picture; picture ``i`` has seed ``seed + i``.
        drawn: precision → what it drew; fp32 first.
        files: path → content of the bundle's report files in JSON.
    """

    bundle: Bundle
    prompts: tuple[str, ...]
    seed: int
    steps: int
    drawn: Mapping[str, Drawn]
    files: Mapping[str, Mapping[str, Any]]

    def size(self, precision: str) -> int:
        """Bytes of a precision's graphs with their weights."""
        manifest = self.bundle.manifest
        graphs = {manifest.components[name].graphs[precision] for name in COMPONENTS}
        return sum(fact.size for file, fact in manifest.files.items() if file.removesuffix(".data") in graphs)

    def psnr(self, precision: str) -> tuple[float | None, ...]:
        """Of each picture against fp32's in dB, None where the two are equal; empty where either was not drawn."""
        pairs = zip(self.drawn[REFERENCE].images, self.drawn[precision].images, strict=False)
        return tuple(
            psnr(np.asarray(reference, np.float64), np.asarray(image, np.float64), 255.0) for reference, image in pairs
        )


def make_report(
    bundle: Bundle,
    prompts: Sequence[str],
    seed: int = 0,
    steps: int = 50,
    backend: str = "auto",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Report:
    """Draw the prompts with each precision the bundle holds, one after another, and read its report files.

    A precision that this machine's backend has no kernels for is told of in the report and is no error.

    Raises:
        SpecError: prompts, seed or steps that the pipeline does not take.
        ManifestError: the bundle is damaged.
    """
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise SpecError(f"prompts: got {len(prompts)}, expected 1..{MAX_PROMPTS}")
    files = {name: read_json(bundle, name) for name in bundle.manifest.files if _is_report(name)}
    requests = [
        Request(prompt, seed=seed + i, eta=0.3, guidance_scale=6.0, num_inference_steps=steps)
        for i, prompt in enumerate(prompts)
    ]
    held, drawn, total = precisions(bundle), {}, len(prompts) * steps
    for index, precision in enumerate(held):

        def told(done: int, what: str = precision, before: int = index * total) -> None:
            progress(what, before + done, len(held) * total)

        drawn[precision] = _draw(bundle, precision, requests, backend, told)
    return Report(bundle, tuple(prompts), seed, steps, drawn, files)


def precisions(bundle: Bundle) -> list[str]:
    """Those in which every component has a graph, fp32 first.

    Raises:
        ManifestError: no fp32 graphs to compare with.
    """
    parts = [bundle.manifest.components[name].graphs for name in COMPONENTS]
    held = [precision for precision in parts[0] if all(precision in graphs for graphs in parts)]
    if REFERENCE not in held:
        raise ManifestError(f"{bundle.folder}: no {REFERENCE} graphs to compare with; rebuild the bundle")
    return sorted(held, key=lambda precision: (ORDER.index(precision) if precision in ORDER else len(ORDER), precision))


def read_json(bundle: Bundle, name: str) -> Mapping[str, Any]:
    """One of the bundle's files as JSON, checked against the manifest first.

    Raises:
        ManifestError: damaged, larger than ``MAX_BYTES``, or no JSON object.
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
    bundle: Bundle, precision: str, requests: Sequence[Request], backend: str, progress: Callable[[int], None]
) -> Drawn:
    images, seconds, ran = list[Image.Image](), list[float](), backend
    try:
        with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend=backend) as pipeline:
            if pipeline.choice:
                ran = f"{pipeline.choice.backend}, computing in {pipeline.choice.arithmetic}"
            for index, request in enumerate(requests):
                steps, begun = pipeline.steps(request), time.perf_counter()
                for step in steps:
                    seconds.append(time.perf_counter() - begun)
                    progress(index * step.total + step.index + 1)
                    begun = time.perf_counter()
                images += _decoded(pipeline, step.latents)
    except BackendError as error:
        return Drawn(backend=ran, failure=str(error))
    return Drawn(tuple(images), median(seconds), ran)


def _decoded(pipeline: LatentDiffusionPipeline, latents: np.ndarray[Any, np.dtype[np.float32]]) -> list[Image.Image]:
    try:
        return pipeline.decode(latents)
    except SpecError as error:  # NaN: a finding about the precision, as is an engine that fails
        raise BackendError(str(error)) from None
