"""Compares backends with the first one: results of each component on the same inputs, and one generated image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_export.quality.measures import TOLERANCES, ComponentResult, Tolerance, compared
from ldm_export.quality.polygraphy_engines import POLYGRAPHY
from ldm_export.quality.real_feeds import real_feeds
from ldm_export.requests import RequestFields
from ldm_runtime.backends import Feed
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["IMAGE", "Difference", "Run", "compare", "facts", "parse_runs"]

IMAGE = "image"
"""Name of the generated image among the compared parts."""


@dataclass(frozen=True)
class Run:
    """A backend or an engine of ``POLYGRAPHY``, and the precision of its graphs; None lets the backend choose it."""

    backend: str
    precision: str | None

    def __str__(self) -> str:
        return self.backend if self.precision is None else f"{self.backend}:{self.precision}"


@dataclass(frozen=True)
class Difference:
    """Difference between a run and the first run in one part (a component or the image), and its tolerance."""

    run: str
    part: str
    result: ComponentResult
    tolerance: Tolerance

    @property
    def failure(self) -> str | None:
        """Error message of one line if the difference exceeds the tolerance, else None."""
        got, allowed = self.result, self.tolerance
        if self.part != IMAGE and not got.max_error <= allowed.component:
            return f"{self.run}: {self.part}: max error {got.max_error:.2e}, allowed {allowed.component:.2e}"
        if self.part == IMAGE and got.psnr is not None and not got.psnr >= max(allowed.psnr, 20):
            return f"{self.run}: image: PSNR {got.psnr:.1f} dB, expected at least {max(allowed.psnr, 20):g} dB"
        return None


def parse_runs(text: str, precision: str | None) -> tuple[Run, ...]:
    """Parse two or more backends, e.g. "onnxruntime,openvino:fp32"; those without a precision get ``precision``.

    Raises:
        SpecError: There are fewer than two, or one of them occurs twice.
    """
    parts = [part.strip().partition(":") for part in text.split(",")]
    runs = tuple(Run(backend, own or precision) for backend, _, own in parts)
    if len(runs) < 2 or len(set(runs)) != len(runs):
        raise SpecError(f"--backends: got {text!r:.80}, expected two or more that differ, as onnxruntime,openvino:fp32")
    return runs


def compare(
    bundle: Bundle,
    runs: Sequence[Run],
    requests: Sequence[RequestFields],
    steps: int | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Difference, ...]:
    """Run every component on the inputs of the first run, and generate the first request's image, on each backend.

    All pipelines are opened first. Their components are loaded one at a time, and freed before the next run.

    Args:
        bundle: The bundle to run.
        runs: Backends and precisions; the first is the reference.
        requests: Requests for one image each, with seeds 0, 1, ….
        steps: Denoising steps of the image; None takes the model's default.
        on_progress: Called with the name of the run, the number of finished runs, and the number of all runs.

    Raises:
        ManifestError, BackendError: The bundle is damaged, or a backend cannot run it.
        SpecError: The model does not take a value.
    """
    feeds: Mapping[str, Feed] = {}
    first: dict[str, dict[str, NDArray[Any]]] = {}
    coarsest, differences = TOLERANCES["fp32"], list[Difference]()
    pipelines = [  # all of them before the first runs, so that one that cannot be opened is reported at once
        LatentDiffusionPipeline.from_bundle(
            bundle,
            backend=POLYGRAPHY.get(run.backend, run.backend),
            precision=run.precision,
            keep_loaded=False,
        )
        for run in runs
    ]
    for done, (run, opened) in enumerate(zip(runs, pipelines, strict=True)):
        on_progress(str(run), done, len(runs))
        with opened as pipeline:
            feeds = feeds or real_feeds(pipeline, bundle.file, requests).components
            results = {}
            for name, feed in feeds.items():
                results[name] = pipeline.backends[name].run(feed)
                pipeline.backends[name].close()
            image = pipeline(**{"seed": 0, "num_inference_steps": steps, **requests[0]}).images[0]
            results[IMAGE] = {IMAGE: np.asarray(image, np.float64)}
            choice = pipeline.choice  # now, because "auto" may have replaced it
            assert choice is not None
            tolerance = _coarser(TOLERANCES.get(choice.graph, TOLERANCES["bf16"]), TOLERANCES[choice.arithmetic])
        if not first:
            first, coarsest = results, tolerance
            continue
        differences += [
            Difference(str(run), name, compared(name, got, first[name]), _coarser(coarsest, tolerance))
            for name, got in results.items()
        ]
    on_progress("compared", len(runs), len(runs))
    return tuple(differences)


def facts(runs: Sequence[Run], differences: Sequence[Difference]) -> dict[str, Any]:
    """Return the differences as JSON values; figures that are not finite become None."""

    def plain(result: ComponentResult) -> dict[str, Any]:
        figures = {"max_error": result.max_error, "cosine": result.cosine, "psnr": result.psnr}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}

    return {
        "against": str(runs[0]),
        "differences": [{"run": one.run, "part": one.part, **plain(one.result)} for one in differences],
        "within_tolerance": not any(one.failure for one in differences),
    }


def _coarser(one: Tolerance, other: Tolerance) -> Tolerance:
    return max(one, other, key=lambda tolerance: tolerance.component)
