"""Observes a graph on real inputs: histogram and channel magnitudes of each tensor that may become int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_calibration.graph_files import load_graph
from ldm_calibration.layers import Layer, Shape, find_layers, flops
from ldm_calibration.probes import add_outputs, add_shapes
from ldm_calibration.sessions import Session
from ldm_calibration.trajectories import Feed
from ldm_runtime.errors import BuildError

__all__ = ["Observations", "graph_flops", "observe", "tensors_of"]

CHUNK_BYTES = 512_000_000
"""Maximum bytes of tensors that one call returns; if there are more, the graph runs several times on each input."""


@dataclass(frozen=True)
class Observations:
    """Observations of one graph.

    Attributes:
        channels: Every tensor that a candidate layer reads, and every result of a candidate convolution -> largest
            magnitude of each channel, float32 [channels].
        flops: Layer -> operations for one row; a multiply-add counts as two.
        shapes: Tensor -> its shape in one call.
    """

    channels: Mapping[str, NDArray[np.float32]]
    flops: Mapping[str, int]
    shapes: Mapping[str, Shape]


def observe(
    graph: Path, feeds: Sequence[Feed], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Observations:
    """Observe the tensors of all layers that may be quantized, over all feeds.

    Memory is that of the graph's weights, the activations of one call and ``CHUNK_BYTES``, for any number of inputs.

    Args:
        graph: fp32 graph.
        feeds: Real feeds of the graph.
        on_progress: Called with the number of finished calls and of all calls.

    Raises:
        BuildError: There are no feeds, or a tensor is not finite.
    """
    if not feeds:
        raise BuildError(f"{graph.parent.name}: got no feeds to calibrate with, expected at least one")
    model = load_graph(graph)
    layers = find_layers(model.graph)
    shapes = _shapes(graph, layers, feeds[0])
    candidates = [layer for layer in layers if not layer.float_only]
    axes = {layer.source: layer.channel_axis for layer in candidates}
    axes |= {layer.result: 1 for layer in candidates if layer.op == "Conv"}
    channels: dict[str, NDArray[np.float32]] = {}
    for chunk in tensors_of(graph, list(axes), shapes, feeds, on_progress):
        for name, values in chunk.items():
            channels[name] = _largest(values, axes[name], channels.get(name))
            if not np.isfinite(channels[name]).all():
                raise BuildError(
                    f"{graph.parent.name}: tensor {name!r} is not finite in fp32; check the checkpoint's weights"
                )
    return Observations(channels, _flops(model, layers, shapes, feeds[0]), shapes)


def graph_flops(graph: Path, feed: Feed) -> dict[str, int]:
    """Layer -> operations for one row; a multiply-add counts as two.

    Args:
        graph: fp32 graph.
        feed: Any feed of the graph, whose leading axes are rows.
    """
    model = load_graph(graph)
    layers = find_layers(model.graph)
    return _flops(model, layers, _shapes(graph, layers, feed), feed)


def tensors_of(
    graph: Path,
    names: Sequence[str],
    shapes: Mapping[str, Shape],
    feeds: Sequence[Feed],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Yield the values of tensors, for each chunk of tensors and each feed. The feed gives inputs of the graph.

    Args:
        graph: fp32 graph.
        names: Tensors of the graph.
        shapes: Tensor -> its shape in one call.
        feeds: Real feeds of the graph.
        on_progress: Called with the number of finished calls and of all calls.
    """
    inputs = [name for name in names if name in feeds[0]]
    chunks = _chunks([name for name in names if name not in feeds[0]], shapes)
    total, done = len(chunks) * len(feeds), 0
    for number, chunk in enumerate(chunks):
        model = load_graph(graph)
        add_outputs(model, chunk)
        session = Session(model, graph.parent)
        for feed in feeds:
            on_progress(done, total)
            outputs = session.run(feed, chunk)
            yield outputs if number else {**{name: feed[name] for name in inputs}, **outputs}
            done += 1
        del session
    on_progress(total, total)


def _flops(model: ir.Model, layers: Sequence[Layer], shapes: Mapping[str, Shape], feed: Feed) -> dict[str, int]:
    rows = len(next(iter(feed.values())))
    weights = {layer.weight: model.graph.initializers[layer.weight].shape for layer in layers if layer.weight}
    sizes = {name: shape.numpy() for name, shape in weights.items() if shape is not None}
    return {layer.name: flops(layer, sizes.get(layer.weight or ""), shapes) // rows for layer in layers}


def _shapes(graph: Path, layers: Sequence[Layer], feed: Feed) -> dict[str, Shape]:
    """Return the shapes of the sources and results of all layers in one call."""
    model = load_graph(graph)
    computed = {value.name for node in model.graph for value in node.outputs}
    names = [name for layer in layers for name in (layer.source, layer.result) if name in computed]
    added = add_shapes(model, names)
    outputs = Session(model, graph.parent).run(feed, list(added))
    shapes: dict[str, Shape] = {name: array.shape for name, array in feed.items()}
    return shapes | {added[name]: tuple(array.tolist()) for name, array in outputs.items()}


def _chunks(names: Sequence[str], shapes: Mapping[str, Shape]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    free_bytes = CHUNK_BYTES
    for name in names:
        size = 4 * prod(shapes[name])
        if chunks[-1] and size > free_bytes:
            chunks.append([])
            free_bytes = CHUNK_BYTES
        chunks[-1].append(name)
        free_bytes -= size
    return chunks


def _largest(values: NDArray[np.float32], axis: int, before: NDArray[np.float32] | None) -> NDArray[np.float32]:
    axis %= values.ndim
    now: NDArray[np.float32] = np.abs(values).max(tuple(i for i in range(values.ndim) if i != axis))
    return now if before is None else np.maximum(before, now)
