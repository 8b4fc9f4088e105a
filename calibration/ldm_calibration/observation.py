"""Runs a graph on samples and keeps each tensor's histogram and its channels' magnitudes, for those to be quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_calibration.histogram import Histogram
from ldm_calibration.layers import Layer, Shape, find_layers, flops
from ldm_calibration.sessions import Session, load_graph
from ldm_runtime.errors import BuildError

Feed = Mapping[str, NDArray[Any]]
CHUNK_BYTES = 512_000_000
"""Tensors taken out of a graph at once; a graph with more is run several times on each sample."""


@dataclass(frozen=True)
class Observations:
    """What was seen of a graph.

    Attributes:
        histograms: of every source and every convolution's result.
        channels: each of these → the largest magnitude of each of its channels.
        flops: layer → operations of one row, a multiply-add counted as two.
        shapes: tensor → its shape in one call.
    """

    histograms: Mapping[str, Histogram]
    channels: Mapping[str, NDArray[np.float32]]
    flops: Mapping[str, int]
    shapes: Mapping[str, Shape]


def observe(
    graph: Path, feeds: Sequence[Feed], progress: Callable[[int, int], None] = lambda done, total: None
) -> Observations:
    """Observe the tensors of all layers that may be quantized, over all feeds.

    Memory: the graph's weights, one call's activations and ``CHUNK_BYTES``, however many feeds there are.

    Raises:
        BuildError: there are no feeds, or a tensor is not finite.
    """
    if not feeds:
        raise BuildError(f"{graph.parent.name}: no samples to calibrate with; give at least one prompt")
    model = load_graph(graph)
    layers = find_layers(model.graph)
    shapes = _shapes(graph, layers, feeds[0])
    rows = len(next(iter(feeds[0].values())))
    sizes = {value.name: value.shape.numpy() for value in _weights(model.graph, layers) if value.shape is not None}
    work = {layer.name: flops(layer, sizes.get(layer.weight or ""), shapes) // rows for layer in layers}
    candidates = [layer for layer in layers if not layer.float_only]
    axes = {layer.source: layer.channel_axis for layer in candidates}
    axes |= {layer.result: 1 for layer in candidates if layer.op == "Conv"}
    tensors = list(axes)
    histograms = {name: Histogram() for name in tensors}
    channels: dict[str, NDArray[np.float32]] = {}
    for found in tensors_of(graph, tensors, shapes, feeds, progress):
        for name, values in found.items():
            try:
                histograms[name].add(values)
            except ValueError:
                raise BuildError(
                    f"{graph.parent.name}: tensor {name!r} is not finite in fp32; check the checkpoint's weights"
                ) from None
            channels[name] = _largest(values, axes[name], channels.get(name))
    return Observations(histograms, channels, work, shapes)


def tensors_of(
    graph: Path,
    names: Sequence[str],
    shapes: Mapping[str, Shape],
    feeds: Sequence[Feed],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """For each chunk of tensors and each feed, these values; what is a graph's input is taken from the feed."""
    chunks = _chunks([name for name in names if name not in feeds[0]], shapes)
    total, done = len(chunks) * len(feeds), 0
    given = [name for name in names if name in feeds[0]]
    for number, chunk in enumerate(chunks):
        session = Session(_with_outputs(load_graph(graph), chunk), graph.parent)
        for feed in feeds:
            progress(done, total)
            found = session.run(feed, chunk)
            yield found if number else {**{name: feed[name] for name in given}, **found}
            done += 1
        del session
    progress(total, total)


def _weights(graph: ir.Graph, layers: Sequence[Layer]) -> list[ir.Value]:
    return [graph.initializers[layer.weight] for layer in layers if layer.weight is not None]


def _shapes(graph: Path, layers: Sequence[Layer], feed: Feed) -> dict[str, Shape]:
    """The shapes of all layers' sources and results in one call."""
    model = load_graph(graph)
    values = {value.name: value for node in model.graph for value in node.outputs}
    names = [name for layer in layers for name in (layer.source, layer.result) if name in values]
    shapes = {name: array.shape for name, array in feed.items()}
    asked = {}
    for name in dict.fromkeys(names):
        node = ir.node("Shape", [values[name]], name=f"{name}/shape")
        node.outputs[0].name, node.outputs[0].type = f"{name}/shape", ir.TensorType(ir.DataType.INT64)
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
        asked[f"{name}/shape"] = name
    found = Session(model, graph.parent).run(feed, list(asked))
    return shapes | {asked[name]: tuple(array.tolist()) for name, array in found.items()}


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    values = {value.name: value for node in model.graph for value in node.outputs}
    held = {value.name for value in model.graph.outputs}
    for name in names:
        if name not in held:
            model.graph.outputs.append(values[name])
    return model


def _chunks(names: Sequence[str], shapes: Mapping[str, Shape]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    room = CHUNK_BYTES
    for name in names:
        size = 4 * prod(shapes[name])
        if chunks[-1] and size > room:
            chunks.append([])
            room = CHUNK_BYTES
        chunks[-1].append(name)
        room -= size
    return chunks


def _largest(values: NDArray[np.float32], axis: int, before: NDArray[np.float32] | None) -> NDArray[np.float32]:
    axis %= values.ndim
    now = np.abs(values).max(tuple(i for i in range(values.ndim) if i != axis))
    return now if before is None else np.maximum(before, now)
