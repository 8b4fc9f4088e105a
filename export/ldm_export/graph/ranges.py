"""How large each tensor of a model's graphs grows over real denoising trajectories."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from ldm_runtime.backends import Backend, SpecBackend
from ldm_runtime.backends.onnxruntime import first_line
from ldm_runtime.conditioning.tokenizer import Tokenizer
from ldm_runtime.ddim import DDIM
from ldm_runtime.errors import BuildError
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request
from ldm_runtime.specs import ComponentSpec, check_feed

HIGHEST, LOWEST = "range/highest", "range/lowest"


class RangeBackend(SpecBackend):
    """Runs a component's graph and keeps the largest magnitude of every tensor it computes.

    ``ranges`` is tensor name → largest magnitude so far. The graph is loaded at the first run. Meanwhile a probe lies
    beside it: the same graph, weights referred to, in which each tensor's maximum and minimum are two numbers more; no
    tensor is kept.
    """

    def __init__(self, graph: Path, spec: ComponentSpec):
        self._graph, self._spec = graph, spec
        self._session: onnxruntime.InferenceSession | None = None
        self._names: list[str] = []
        self.ranges: dict[str, float] = {}

    def _load(self) -> onnxruntime.InferenceSession:
        probe = self._graph.with_name(f".{self._graph.stem}.probe.onnx")
        self._names = _write_probe(self._graph, probe)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED  # the graph's: tensors are freed on the way
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises bare classes of its C++ side
            raise BuildError(f"{self._spec.name}: onnxruntime cannot load {self._graph}: {first_line(error)}") from None
        finally:
            probe.unlink()

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once.

        Raises:
            BuildError: a tensor is not finite.
        """
        check_feed(self._spec, feed)
        self._session = self._session or self._load()
        names = [tensor.name for tensor in self._spec.outputs]
        *results, highest, lowest = self._session.run([*names, HIGHEST, LOWEST], dict(feed))
        for name, high, low in zip(self._names, highest.tolist(), lowest.tolist(), strict=True):
            if not (math.isfinite(high) and math.isfinite(low)):
                raise BuildError(
                    f"{self._spec.name}: tensor {name!r} is not finite in fp32; check the checkpoint's weights"
                )
            self.ranges[name] = max(self.ranges.get(name, 0.0), high, -low)
        return dict(zip(names, results, strict=True))

    def close(self) -> None:
        """Free the session; the next run loads it anew."""
        self._session = None


def measure_ranges(
    graphs: Mapping[str, Path],
    specs: Mapping[str, ComponentSpec],
    tokenizer: Path,
    scheduler: DDIM,
    prompts: Sequence[str],
    steps: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:
    """Component → tensor → largest magnitude, over one guided trajectory for each prompt, seeds 0, 1, ….

    All prompts go through one component before the next is loaded, so the largest alone bounds the memory.

    Args:
        graphs: component → fp32 graph; the folders must be writable.
        tokenizer: ``tokenizer.json``.
        steps: denoising steps of each trajectory, spread over the whole schedule; eta 0.3, guidance 6.0.
        progress: told steps done and in all.

    Raises:
        BuildError: the model gives NaN or infinity.
    """
    backends = {name: RangeBackend(graphs[name], spec) for name, spec in specs.items()}
    given: dict[str, Backend] = dict(backends)
    tokens = int(specs["text_encoder"].inputs[0].bounds("opt")[1])
    with LatentDiffusionPipeline(given, Tokenizer.from_file(tokenizer, tokens), scheduler) as pipeline:
        pipeline.texts.encode([*prompts, ""])  # kept for the requests below
        backends["text_encoder"].close()
        made = []
        for seed, prompt in enumerate(prompts):
            request = Request(prompt, seed=seed, eta=0.3, guidance_scale=6.0, num_inference_steps=steps)
            last = None
            for last in pipeline.steps(request):
                progress(seed * steps + last.index + 1, len(prompts) * steps)
            assert last is not None
            made.append(last.latents)
        backends["unet"].close()
        for latents in made:
            pipeline.decode(latents)
        return {name: backend.ranges for name, backend in backends.items()}


def _write_probe(graph: Path, probe: Path) -> list[str]:
    """Write the probe and return the names of the tensors it measures."""
    model = ir.load(graph)
    tensors = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    one = ir.Value(name="range/one", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    one.const_value = ir.tensor([1], dtype=ir.DataType.INT64, name="range/one")
    model.graph.initializers["range/one"] = one
    for name, kind in ((HIGHEST, "ReduceMax"), (LOWEST, "ReduceMin")):
        numbers = []
        for value in tensors:
            reduced = ir.node(kind, [value], {"keepdims": 0}, name=f"range/{kind}/{value.name}")
            lifted = ir.node("Reshape", [reduced.outputs[0], one], name=f"range/{kind}/Reshape/{value.name}")
            model.graph.insert_after(value.producer(), [reduced, lifted])  # in this order they run: see _load
            numbers.append(lifted.outputs[0])
        joined = ir.node("Concat", numbers, {"axis": 0}, name=name)
        joined.outputs[0].name, joined.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        joined.outputs[0].shape = ir.Shape([len(numbers)])
        model.graph.append(joined)
        model.graph.outputs.append(joined.outputs[0])
    ir.save(model, probe)
    return [value.name or "" for value in tensors]
