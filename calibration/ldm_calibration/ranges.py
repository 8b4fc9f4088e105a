"""Measures the largest magnitude of every tensor of a model's fp32 graphs along denoising trajectories."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ldm_calibration.graph_files import load_graph
from ldm_calibration.model import CalibrationModel, ImageRequest
from ldm_calibration.probes import HIGHEST, LOWEST, add_extremes
from ldm_calibration.sessions import Session
from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.conditioning import StartImageConditioner
from ldm_runtime.errors import BuildError
from ldm_runtime.model import DECODER, UNET
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request
from ldm_runtime.specs import ComponentSpec, check_feed

__all__ = ["RangeBackend", "measure_ranges"]


class RangeBackend(SpecBackend):
    """Runs a component's graph and records the largest magnitude of every float32 tensor that the graph computes.

    The graph is loaded at the first run. A probe in the graph reduces each tensor to two numbers, so no tensor is
    stored.

    Args:
        graph: fp32 graph.
        spec: Inputs and outputs of the graph.
        remember: True stores the outputs of each distinct feed, and returns them for an equal feed without loading the
            graph.

    Attributes:
        ranges: Tensor -> largest magnitude so far.
    """

    def __init__(self, graph: Path, spec: ComponentSpec, *, remember: bool = False):
        self._graph, self._spec, self._remember = graph, spec, remember
        self._session: Session | None = None
        self._tensors: list[str] = []
        self._cache: dict[bytes, dict[str, NDArray[Any]]] = {}
        self.ranges: dict[str, float] = {}

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run once.

        Raises:
            SpecError: The feed does not fit the spec.
            BuildError: ONNX Runtime cannot run the graph, or a tensor is not finite.
        """
        check_feed(self._spec, feed)
        key = _digest(feed) if self._remember else b""
        if key in self._cache:
            return dict(self._cache[key])
        outputs = self._run(feed)
        if self._remember:
            self._cache[key] = dict(outputs)
        return outputs

    def _run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        if self._session is None:
            model = load_graph(self._graph)
            self._tensors = add_extremes(model)
            self._session = Session(model, self._graph.parent)
        names = [tensor.name for tensor in self._spec.outputs]
        outputs = self._session.run(feed, [*names, HIGHEST, LOWEST])
        highest, lowest = outputs.pop(HIGHEST), outputs.pop(LOWEST)
        for name, high, low in zip(self._tensors, highest.tolist(), lowest.tolist(), strict=True):
            if not (math.isfinite(high) and math.isfinite(low)):
                raise BuildError(
                    f"{self._spec.name}: tensor {name!r} is not finite in fp32; check the checkpoint's weights"
                )
            self.ranges[name] = max(self.ranges.get(name, 0.0), high, -low)
        return outputs

    def close(self) -> None:
        """Free the session. The next run with a feed that is not stored loads the graph again."""
        self._session = None


def measure_ranges(
    model: CalibrationModel,
    requests: Sequence[ImageRequest],
    steps: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Measure the largest magnitude of every tensor over one trajectory for each request.

    All requests run through one component before the next component is loaded, so the largest component determines the
    memory. Image ``i`` has seed ``i``; eta and guidance scale are the model's defaults.

    The encoder of a model that can start from images is measured on the images that the trajectories generate.

    Args:
        model: The model.
        requests: Fields of ``Request`` for one image each.
        steps: Number of denoising steps of each trajectory, over the whole schedule.
        on_progress: Called with the number of finished steps and of all steps.

    Returns:
        Component -> tensor -> largest magnitude, for every component of ``model.graphs``.

    Raises:
        BuildError: There are no requests, or the model computes NaN or infinity.
        SpecError: A request does not fit the model.
    """
    if not requests:
        raise BuildError("ranges: got no requests to measure with, expected at least one")
    backends = {
        name: RangeBackend(graph, model.spec(name), remember=name not in (UNET, DECODER))
        for name, graph in model.graphs.items()
    }
    singles = [replace(model.batches([request])[0], indices=(seed,)) for seed, request in enumerate(requests)]
    calls = [single.request(0, num_inference_steps=steps) for single in singles]
    with model.pipeline(dict(backends), keep_loaded=True) as pipeline:
        _run_constant(pipeline, calls)
        latents = []
        for number, request in enumerate(calls):
            for step in pipeline.steps(request):
                on_progress(number * step.total + step.index + 1, len(calls) * step.total)
                last = step
            latents.append(last.latents)
        pipeline.denoiser.close()
        images = [pipeline.decode_array(array) for array in latents]
        pipeline.backends[DECODER].close()
        for encoder in (one for one in pipeline.conditioners if isinstance(one, StartImageConditioner)):
            for image in images:
                encoder.distribution(image * 2 - 1)
    return {name: backend.ranges for name, backend in backends.items()}


def _run_constant(pipeline: LatentDiffusionPipeline, requests: Sequence[Request]) -> None:
    """Run the components that are constant over the steps one after the other. The backends store their outputs."""
    plans = [pipeline.plan(request) for request in requests]
    for conditioner in pipeline.conditioners:
        for plan in plans:
            for branch in plan.branches:
                conditioner.rows(plan.request, branch)
        conditioner.close()
    for plan in plans:
        pipeline.condition(plan, pipeline.begin(plan))
    pipeline.denoiser.close()
    for plan in plans:
        pipeline.denoiser.embed(plan.trajectory.timesteps)
    pipeline.denoiser.close()


def _digest(feed: Feed) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(feed):
        digest.update(f"{name} {feed[name].dtype} {feed[name].shape} ".encode())
        digest.update(feed[name].tobytes())
    return digest.digest()
