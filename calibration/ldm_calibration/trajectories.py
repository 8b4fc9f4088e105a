"""Denoising trajectories through a bundle's own fp32 graphs: what each component is given, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_calibration.layers import find_layers
from ldm_calibration.sessions import LARGE, Session, SessionBackend, files_of, load_graph
from ldm_runtime.backends import Backend, SpecBackend
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.conditioning.tokenizer import Tokenizer
from ldm_runtime.ddim import DDIM
from ldm_runtime.errors import BuildError, SpecError
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request
from ldm_runtime.specs import ComponentSpec

F32 = NDArray[np.float32]
ROOM = 2048
"""Latent pixels in one call: small models run several pictures at once, large ones one."""
_LARGEST = "calibration/largest"


@dataclass(frozen=True)
class Model:
    """What a pipeline is made of: fp32 graphs and specs by component, ``tokenizer.json``, scheduler."""

    graphs: Mapping[str, Path]
    specs: Mapping[str, ComponentSpec]
    tokenizer: Path
    scheduler: DDIM

    def pipeline(self, changed: Mapping[str, Backend] | None = None) -> LatentDiffusionPipeline:
        """A pipeline of the fp32 graphs on ONNX Runtime, ``changed`` in place of some.

        Components are loaded when they are used; those of a large model are freed before the next is.
        """
        backends = {name: self._backend(name) for name in self.specs} | dict(changed or {})
        tokens = self.specs["text_encoder"].inputs[0].bounds("opt")[1]
        small = sum(file.stat().st_size for graph in self.graphs.values() for file in files_of(graph)) <= LARGE
        tokenizer = Tokenizer.from_file(self.tokenizer, tokens)
        return LatentDiffusionPipeline(backends, tokenizer, self.scheduler, keep_loaded=small)

    def _backend(self, name: str) -> Backend:
        graph, spec = self.graphs[name], self.specs[name]
        return LazyBackend(spec, lambda: SessionBackend(Session(load_graph(graph), graph.parent), spec))

    def batches(self, prompts: Sequence[str]) -> list[tuple[list[str], list[int]]]:
        """Prompts with their seeds (0, 1, …: a seed for each picture), as many in one as fit a call."""
        _, _, height, width = self.specs["decoder"].inputs[0].bounds("opt")
        most = self.specs["decoder"].inputs[0].bounds("max")[0]
        size = max(1, min(most, ROOM // (height * width)))
        return [
            (list(prompts[start : start + size]), list(range(start, min(start + size, len(prompts)))))
            for start in range(0, len(prompts), size)
        ]


@dataclass(frozen=True, eq=False)
class Trajectories:
    """What was recorded.

    Attributes:
        timesteps: of the steps, int64 [steps].
        contexts: for each batch float32 [rows, T, D], with guidance the unguided rows first.
        samples: for each batch the UNet's inputs float32 [steps, rows, C, h, w].
        latents: for each batch the final latents float32 [images, C, h, w].
        tokens: for each batch int64 [texts, T].
        largest: the largest magnitude of each source at each step, float32 [steps, sources], over all batches.
        sources: the names of these tensors.
    """

    timesteps: NDArray[np.int64]
    contexts: list[F32]
    samples: list[F32]
    latents: list[F32]
    tokens: list[NDArray[np.int64]]
    largest: F32
    sources: tuple[str, ...]

    def save(self, file: Path) -> None:
        """Write all of it to one ``.npz``."""
        lists = {name: getattr(self, name) for name in ("contexts", "samples", "latents", "tokens")}
        arrays = {f"{name}.{i}": array for name, held in lists.items() for i, array in enumerate(held)}
        np.savez(file, timesteps=self.timesteps, largest=self.largest, sources=np.array(self.sources), **arrays)

    @classmethod
    def load(cls, file: Path) -> Trajectories:
        """Read what ``save`` wrote."""
        with np.load(file, allow_pickle=False) as held:
            count = sum(name.startswith("samples.") for name in held.files)
            lists = {
                name: [held[f"{name}.{i}"] for i in range(count)]
                for name in ("contexts", "samples", "latents", "tokens")
            }
            return cls(
                timesteps=held["timesteps"], largest=held["largest"], sources=tuple(held["sources"].tolist()), **lists
            )


class _Watched(SpecBackend):
    """The UNet with, at each call, the largest magnitude of each source, reduced inside the graph; keeps its feeds."""

    def __init__(self, graph: Path, spec: ComponentSpec):
        self._spec = spec
        model = load_graph(graph)
        self.sources = _add_largest(model.graph)
        self._session = Session(model, graph.parent)
        self.feeds: list[Mapping[str, NDArray[Any]]] = []
        self.largest: list[F32] = []

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        found = self._session.run(feed)
        largest = found.pop(_LARGEST)
        if not np.isfinite(largest).all() or not all(np.isfinite(array).all() for array in found.values()):
            raise BuildError("unet: gives NaN or infinity in fp32; check the checkpoint's weights")
        self.feeds.append(dict(feed))
        self.largest.append(largest)
        return found

    def close(self) -> None:
        pass


def _add_largest(graph: ir.Graph) -> tuple[str, ...]:
    """Add one output: the largest magnitudes of all sources, those that are the graph's own inputs left out."""
    values = {value.name: value for node in graph for value in node.outputs}
    names = tuple(dict.fromkeys(layer.source for layer in find_layers(graph) if not layer.float_only))
    names = tuple(name for name in names if name in values)
    one = ir.Value(name="calibration/one", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    one.const_value = ir.tensor([1], dtype=ir.DataType.INT64, name="calibration/one")
    graph.initializers["calibration/one"] = one
    numbers = []
    for name in names:
        magnitudes = ir.node("Abs", [values[name]], name=f"{name}/abs")
        reduced = ir.node("ReduceMax", [magnitudes.outputs[0]], {"keepdims": 0}, name=f"{name}/largest")
        lifted = ir.node("Reshape", [reduced.outputs[0], one], name=f"{name}/lifted")
        graph.extend([magnitudes, reduced, lifted])
        numbers.append(lifted.outputs[0])
    joined = ir.node("Concat", numbers, {"axis": 0}, name=_LARGEST)
    joined.outputs[0].name, joined.outputs[0].type = _LARGEST, ir.TensorType(ir.DataType.FLOAT)
    graph.append(joined)
    graph.outputs.append(joined.outputs[0])
    return names


def run_trajectories(
    model: Model,
    prompts: Sequence[str],
    steps: int,
    eta: float,
    guidance: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trajectories:
    """One guided trajectory for each prompt; picture ``i`` starts from seed ``i``.

    Raises:
        BuildError: no prompts, or the model gives NaN or infinity.
    """
    if not prompts:
        raise BuildError("prompts: got none to calibrate with, expected at least one; give --prompts FILE")
    watched = _Watched(model.graphs["unet"], model.specs["unet"])
    batches = model.batches(prompts)
    contexts, samples, latents, tokens, largest = [], [], [], [], []
    timesteps = np.zeros(0, np.int64)
    with model.pipeline({"unet": watched}) as pipeline:
        for number, (texts, seeds) in enumerate(batches):
            try:
                request = Request(texts, seed=seeds, eta=eta, guidance_scale=guidance, num_inference_steps=steps)
                for step in pipeline.steps(request):
                    progress(number * step.total + step.index + 1, len(batches) * step.total)
                    last = step
            except SpecError as error:
                raise BuildError(f"calibration: {error}") from None
            feeds, watched.feeds = watched.feeds, []
            seen, watched.largest = watched.largest, []
            timesteps = np.array([feed["timestep"][0] for feed in feeds])
            contexts.append(feeds[0]["context"])
            samples.append(np.stack([feed["sample"] for feed in feeds]))
            latents.append(last.latents)
            tokens.append(pipeline.tokenizer(["", *texts] if guidance != 1.0 else texts))
            largest.append(np.stack(seen))
    return Trajectories(timesteps, contexts, samples, latents, tokens, np.max(largest, axis=0), watched.sources)
