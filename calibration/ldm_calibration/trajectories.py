"""Runs denoising trajectories with a model's fp32 graphs, and records the inputs of each component."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.graph_files import load_graph
from ldm_calibration.layers import find_layers
from ldm_calibration.model import CalibrationModel, FeedBatch, ImageRequest
from ldm_calibration.probes import LARGEST, add_largest
from ldm_calibration.sessions import Session
from ldm_calibration.settings import CalibrationSettings
from ldm_runtime.backends import Backend, SpecBackend
from ldm_runtime.errors import BuildError, SpecError
from ldm_runtime.model import DECODER, LATENTS
from ldm_runtime.specs import ComponentSpec

__all__ = ["Feed", "Trajectories", "run_trajectories"]

F32 = NDArray[np.float32]
Feed = Mapping[str, NDArray[Any]]
_INDEX = "index"
HELD_OUT = 4
"""One of ``HELD_OUT`` requests is held out: tensors are not observed on it, so that scalings are compared on it."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Inputs and ranges recorded along trajectories.

    Attributes:
        timesteps: Timesteps of the steps, int64 or, if fractional, float64 [steps].
        feeds: Component -> its inputs in the order of its calls. The denoiser has one feed for each step of each batch,
            with all steps of a batch together.
        largest: Largest magnitude of each source at each step over all batches, float32 [steps, sources].
        sources: Names of the denoiser's tensors that its layers read, except inputs of the graph.
        held_out: Component -> number of its last feeds that belong to the held-out requests.
    """

    timesteps: NDArray[Any]
    feeds: Mapping[str, Sequence[Feed]]
    largest: F32
    sources: tuple[str, ...]
    held_out: Mapping[str, int]

    def save(self, file: Path) -> None:
        """Write everything to one file in NumPy's ``.npz`` format. Arrays that feeds share are written once."""
        places: dict[int, str] = {}
        arrays: dict[str, NDArray[Any]] = {}

        def place(array: NDArray[Any]) -> str:
            if id(array) not in places:
                places[id(array)] = f"array.{len(places)}"
                arrays[places[id(array)]] = array
            return places[id(array)]

        index = {
            component: [{name: place(array) for name, array in feed.items()} for feed in feeds]
            for component, feeds in self.feeds.items()
        }
        document = json.dumps({"feeds": index, "sources": list(self.sources), "held_out": dict(self.held_out)})
        with file.open("wb") as target:
            np.savez(
                target,
                allow_pickle=False,
                timesteps=self.timesteps,
                largest=self.largest,
                **{_INDEX: np.array(document)},
                **arrays,
            )

    @classmethod
    def load(cls, file: Path) -> Trajectories:
        """Read a file that ``save`` wrote."""
        with np.load(file, allow_pickle=False) as stored:
            document = json.loads(str(stored[_INDEX]))
            arrays = {name: stored[name] for name in stored.files if name.startswith("array.")}
            feeds = {
                component: [{name: arrays[place] for name, place in feed.items()} for feed in feeds]
                for component, feeds in document["feeds"].items()
            }
            return cls(stored["timesteps"], feeds, stored["largest"], tuple(document["sources"]), document["held_out"])


class _ObservedDenoiser(SpecBackend):
    """Runs the denoiser, and records each feed and the largest magnitude of each source, float32 [sources]."""

    def __init__(self, graph: Path, spec: ComponentSpec):
        self._spec = spec
        model = load_graph(graph)
        layers = find_layers(model.graph)
        sources = [layer.source for layer in layers if not layer.float_only]
        inputs = {value.name for value in model.graph.inputs}
        self.sources: tuple[str, ...] = ()
        if any(source not in inputs for source in sources):
            self.sources = add_largest(model, sources)
        self._session = Session(model, graph.parent)
        self.feeds: list[Feed] = []
        self.largest: list[F32] = []

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        outputs = self._session.run(feed)
        largest = outputs.pop(LARGEST, np.zeros(0, np.float32))
        if not all(np.isfinite(array).all() for array in (largest, *outputs.values())):
            raise BuildError(f"{self._spec.name}: got NaN or infinity in fp32; check the checkpoint's weights")
        self.feeds.append(dict(feed))
        self.largest.append(largest)
        return outputs

    def close(self) -> None:
        pass


class _Recorded(SpecBackend):
    """Runs a component, and records each feed."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self.feeds: list[Feed] = []

    @property
    def inputs(self) -> Any:
        return self._backend.inputs

    @property
    def outputs(self) -> Any:
        return self._backend.outputs

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        self.feeds.append(dict(feed))
        return self._backend.run(feed)

    def close(self) -> None:
        self._backend.close()


def run_trajectories(
    model: CalibrationModel,
    settings: CalibrationSettings,
    quantize: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trajectories:
    """Run one trajectory for each of ``settings.requests``; image ``i`` starts from seed ``i``.

    Args:
        model: The model.
        settings: Requests, steps, eta and guidance scale.
        quantize: Components whose feeds are recorded, the denoiser first.
        on_progress: Called with the number of finished steps and of all steps.

    Raises:
        BuildError: A request cannot be run, or the model computes NaN or infinity.
    """
    denoiser, *others = quantize
    observed = _ObservedDenoiser(model.graphs[denoiser], model.spec(denoiser))
    recorded = {name: _Recorded(model.backend(name)) for name in others if name != DECODER}
    batches, held_out = _batches(model, settings.requests)
    largest, latents, timesteps = [], [], np.zeros(0)
    with model.pipeline({denoiser: observed, **recorded}) as pipeline:
        for number, batch in enumerate(batches):
            request = batch.request(
                0, eta=settings.eta, guidance_scale=settings.guidance_scale, num_inference_steps=settings.steps
            )
            step_timesteps = []
            try:
                for step in pipeline.steps(request):
                    step_timesteps.append(step.timestep)
                    on_progress(number * step.total + step.index + 1, len(batches) * step.total)
                    last = step
            except SpecError as error:
                raise BuildError(f"calibration: {error}") from None
            timesteps, step_largest, observed.largest = np.array(step_timesteps), observed.largest, []
            latents.append(last.latents)
            largest.append(np.stack(step_largest))
            if number == len(batches) - held_out - 1:
                before = {denoiser: len(observed.feeds), DECODER: len(latents)}
                before |= {name: len(backend.feeds) for name, backend in recorded.items()}
    feeds: dict[str, Sequence[Feed]] = {denoiser: observed.feeds}
    feeds |= {name: backend.feeds for name, backend in recorded.items()}
    feeds[DECODER] = [{LATENTS: array} for array in latents]
    return Trajectories(
        timesteps,
        {name: feeds[name] for name in quantize},
        np.max(largest, axis=0),
        observed.sources,
        {name: len(feeds[name]) - before[name] for name in quantize},
    )


def _batches(model: CalibrationModel, requests: Sequence[ImageRequest]) -> tuple[list[FeedBatch], int]:
    """Calls of all requests, and how many of the last calls are those of the held-out requests."""
    first = len(requests) - len(requests) // HELD_OUT
    observed, others = model.batches(requests[:first]), model.batches(requests[first:])
    others = [replace(batch, indices=tuple(first + index for index in batch.indices)) for batch in others]
    return observed + others, len(others)
