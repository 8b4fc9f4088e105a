"""Searches the smoothing of each tensor that layers read, with the smallest error of the layers' results."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_calibration.graph_files import load_graph
from ldm_calibration.layers import Layer, find_layers
from ldm_calibration.observation import Observations, tensors_of
from ldm_calibration.qdq import Scaling, along
from ldm_calibration.scalings import GraphScalings, SourceScaling
from ldm_calibration.sessions import Session
from ldm_calibration.trajectories import Feed
from ldm_calibration.weights import LEVELS, quantize_weights, smoothing_factors, weights_of

__all__ = ["search_scalings"]

EXPONENTS = (0.0, 0.5, 0.7, 0.85)
"""Candidate exponents of SmoothQuant; 0 means no smoothing."""
HEADROOM = 1.2
"""Threshold of a tensor that layers read, as a multiple of its largest magnitude. Values grow larger in other images.
Where they are clipped, the layout of the image changes, so that the worst images become much worse."""
LEAST_CHANNEL = 1e-3
"""Lower bound of the magnitude of a result channel, relative to that of the largest channel."""
RESULT_HEADROOM = 1.15
"""Threshold of a result, as a multiple of its largest magnitude: results grow larger in other images."""
BLOCK = 2**20
"""Numbers that are squared at a time."""
F32 = NDArray[np.float32]


def search_scalings(
    graph: Path,
    observed: Observations,
    feeds: Sequence[Feed],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GraphScalings:
    """Try all exponents on real inputs, one layer at a time, and keep the best scaling of each source.

    Args:
        graph: fp32 graph.
        observed: Observations of that graph.
        feeds: Feeds of other requests than the observed ones, because the error on these is that on future images.
            Without other requests, some of the observed feeds.
        on_progress: Called with the number of finished calls and of all calls.
    """
    model = load_graph(graph)
    layers = [layer for layer in find_layers(model.graph) if not layer.float_only]
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.source, []).append(layer)
    weights = model.graph.initializers
    trials: dict[str, list[_Trial]] = {}
    single: dict[str, _Single] = {}
    chunk: list[str] = []
    for tensors in tensors_of(graph, list(readers), observed.shapes, feeds, on_progress):
        if list(tensors) != chunk:  # each session has threads of its own
            single.clear()
            chunk = list(tensors)
        for source, values in tensors.items():
            if source not in trials:
                trials[source] = _trials(observed.channels[source], readers[source], weights)
            for layer in readers[source]:
                if layer.name not in single:
                    single[layer.name] = _Single(model, layer, graph.parent)
                _try(trials[source], single[layer.name], layer, weights_of(weights[layer.weight or ""]), values)
    chosen: dict[str, SourceScaling] = {}
    decibels: dict[str, float] = {}
    for source, candidates in trials.items():
        best = min(candidates, key=lambda trial: trial.loss)
        chosen[source] = SourceScaling(best.exponent, best.scaling)
        decibels |= {name: _decibel(best.power[name], best.error[name]) for name in best.error}
    results = {layer.result: _equalized(observed.channels[layer.result]) for layer in layers if layer.op == "Conv"}
    return GraphScalings(chosen, results, decibels, observed.flops)


def _equalized(channels: F32) -> Scaling:
    """Scale all channels of a result to the magnitude of the largest one; ``LEAST_CHANNEL`` limits the factors."""
    top = float(channels.max()) or 1.0
    factors = np.maximum(channels / np.float32(top), np.float32(LEAST_CHANNEL)).astype(np.float32)
    return Scaling(RESULT_HEADROOM * top, factors)


class _Trial:
    """One exponent, and the error of the layers' results with it."""

    def __init__(self, exponent: float, scaling: Scaling):
        self.exponent, self.scaling = exponent, scaling
        self.error: dict[str, float] = {}
        self.power: dict[str, float] = {}

    @property
    def loss(self) -> float:
        """Error relative to the power of the results, summed over the layers."""
        return sum(self.error[name] / max(self.power[name], 1e-30) for name in self.error)


def _trials(channels: F32, readers: Sequence[Layer], weights: Mapping[str, ir.Value]) -> list[_Trial]:
    largest = np.max([_reading(weights, layer) for layer in readers], axis=0)
    trials = []
    for exponent in EXPONENTS:
        factors = smoothing_factors(channels, largest, exponent)
        bound = float((channels / factors).max()) or 1.0
        trials.append(_Trial(exponent, Scaling(HEADROOM * bound, factors if exponent else None)))
    return trials


def _reading(weights: Mapping[str, ir.Value], layer: Layer) -> F32:
    """Largest magnitude of the weights that read each input channel."""
    array = np.abs(weights_of(weights[layer.weight or ""]))
    largest: F32 = array.max(tuple(i for i in range(array.ndim) if i != layer.in_axis))
    return largest


class _Single:
    """One layer as its own graph, whose weights are an input."""

    def __init__(self, model: ir.Model, layer: Layer, folder: Path):
        node = next(node for node in model.graph if node.name == layer.name)
        x, w = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in "xw")
        alone = ir.Node("", node.op_type, [x, w], list(node.attributes.values()), num_outputs=1, name=layer.name)
        (y,) = alone.outputs
        y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph([x, w], [y], nodes=[alone], name=layer.name, opset_imports={"": model.opset_imports[""]})
        self._session = Session(ir.Model(graph, ir_version=10), folder)

    def __call__(self, x: F32, w: F32) -> F32:
        """Compute the layer's result without its bias."""
        return self._session.run({"x": x, "w": w})["y"]


def _try(trials: Sequence[_Trial], single: _Single, layer: Layer, weights: F32, values: F32) -> None:
    exact = single(values, weights)
    power = _sum_of_squares(exact)
    for trial in trials:
        factors, step, scaled = trial.scaling.factors, trial.scaling.scale, weights
        rounded = values.copy()  # changed in place, because tensors of large images have hundreds of megabytes
        if factors is not None:
            rounded /= along(factors, layer.channel_axis % values.ndim, values.ndim)
            scaled = weights * along(factors, layer.in_axis, weights.ndim)
        quantized, scales = quantize_weights(scaled, layer.out_axis)
        restored = quantized * along(scales, layer.out_axis, quantized.ndim)
        rounded /= step
        np.rint(rounded, out=rounded)
        np.clip(rounded, -LEVELS - 1, LEVELS, out=rounded)
        rounded *= step
        off = single(rounded, restored)
        off -= exact
        trial.error[layer.name] = trial.error.get(layer.name, 0.0) + _sum_of_squares(off)
        trial.power[layer.name] = trial.power.get(layer.name, 0.0) + power


def _sum_of_squares(array: F32) -> float:
    """Sum in float64, without a copy of the whole array in it."""
    flat = array.reshape(-1)
    starts = range(0, flat.size, BLOCK)
    return sum(float(np.square(flat[start : start + BLOCK], dtype=np.float64).sum()) for start in starts)


def _decibel(power: float, error: float) -> float:
    return 10 * math.log10(max(power, 1e-30) / max(error, 1e-30))
