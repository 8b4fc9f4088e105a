"""Backends on the same inputs: how far each of them is from the first, by component and in a whole image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_export.quality.measures import TOLERANCES, ComponentResult, Tolerance, compared
from ldm_export.quality.real_feeds import real_feeds
from ldm_export.requests import RequestFields
from ldm_runtime.backends import Feed
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["PICTURE", "Difference", "Run", "compare", "facts", "parse_runs"]

PICTURE = "picture"
"""Name of the image among the parts that are compared."""


@dataclass(frozen=True)
class Run:
    """A backend and the precision of its graphs (None: its own choice)."""

    backend: str
    precision: str | None

    def __str__(self) -> str:
        return self.backend if self.precision is None else f"{self.backend}:{self.precision}"


@dataclass(frozen=True)
class Difference:
    """What one run gave against the first: a component's result, or the picture's, and what is accepted of it."""

    run: str
    part: str
    result: ComponentResult
    tolerance: Tolerance

    @property
    def failure(self) -> str | None:
        """One line where it is beyond the tolerance."""
        got, allowed = self.result, self.tolerance
        if self.part != PICTURE and not got.max_error <= allowed.component:
            return f"{self.run}: {self.part}: max error {got.max_error:.2e}, allowed {allowed.component:.2e}"
        if self.part == PICTURE and got.psnr is not None and not got.psnr >= max(allowed.psnr, 20):
            return f"{self.run}: picture: PSNR {got.psnr:.1f} dB, expected at least {max(allowed.psnr, 20):g} dB"
        return None


def parse_runs(text: str, precision: str | None) -> tuple[Run, ...]:
    """Parse "onnxruntime,openvino:fp32": two or more backends, each with its own precision or the one given for all.

    Raises:
        SpecError: fewer than two, or one of them twice.
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

    One pipeline after the other is loaded, one component of it at a time.

    Args:
        bundle: What is run.
        runs: Backends and precisions; the first is the one that the others are compared with.
        requests: One image each, with seeds 0, 1, ….
        steps: Denoising steps of the image; None takes the model's default.
        on_progress: Called with what is run, and how many runs are done and in total.

    Raises:
        ManifestError, BackendError: The bundle is damaged, or a backend cannot run it.
        SpecError: A value that the model does not take.
    """
    feeds: Mapping[str, Feed] = {}
    first: dict[str, dict[str, NDArray[Any]]] = {}
    coarsest, found = TOLERANCES["fp32"], []
    for done, run in enumerate(runs):
        on_progress(str(run), done, len(runs))
        with LatentDiffusionPipeline.from_bundle(
            bundle, backend=run.backend, precision=run.precision, keep_loaded=False
        ) as pipeline:
            choice = pipeline.choice
            assert choice is not None
            tolerance = _coarser(TOLERANCES.get(choice.graph, TOLERANCES["bf16"]), TOLERANCES[choice.arithmetic])
            feeds = feeds or real_feeds(pipeline, bundle.file, requests).components
            results = {}
            for name, feed in feeds.items():
                results[name] = pipeline.backends[name].run(feed)
                pipeline.backends[name].close()
            image = pipeline(**{"seed": 0, "num_inference_steps": steps, **requests[0]}).images[0]
            results[PICTURE] = {PICTURE: np.asarray(image, np.float64)}
        if not first:
            first, coarsest = results, tolerance
            continue
        found += [
            Difference(str(run), name, compared(name, got, first[name]), _coarser(coarsest, tolerance))
            for name, got in results.items()
        ]
    on_progress("compared", len(runs), len(runs))
    return tuple(found)


def facts(runs: Sequence[Run], found: Sequence[Difference]) -> dict[str, Any]:
    """JSON-able; a figure that is not finite, as NaN in a result gives, is None."""

    def plain(result: ComponentResult) -> dict[str, Any]:
        figures = {"max_error": result.max_error, "cosine": result.cosine, "psnr": result.psnr}
        return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}

    return {
        "against": str(runs[0]),
        "differences": [{"run": one.run, "part": one.part, **plain(one.result)} for one in found],
        "within_tolerance": not any(one.failure for one in found),
    }


def _coarser(one: Tolerance, other: Tolerance) -> Tolerance:
    return max(one, other, key=lambda tolerance: tolerance.component)
