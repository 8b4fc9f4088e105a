"""Writes int8 into a graph: explicit QuantizeLinear and DequantizeLinear around the layers that are chosen.

One form serves ONNX Runtime, OpenVINO and TensorRT:

- symmetric int8, zero point 0, one scale per tensor, one per output channel of weights (TensorRT takes no zero point);
- biases in float (TensorRT refuses int32 ones; ONNX Runtime and OpenVINO make theirs);
- each layer reads through a pair of its own, though others read the same tensor: ONNX Runtime turns int8 into the
  uint8 its kernels want only where one DequantizeLinear reads a QuantizeLinear. The other engines merge equal pairs;
- a convolution's result passes a pair too: without, ONNX Runtime computes it in float. Its channels are brought to one
  size before, which costs its weights' scales and its bias nothing, and back by a multiplication behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_calibration.layers import Layer, find_layers
from ldm_calibration.observers import LEVELS
from ldm_calibration.weights import quantize_weights, weights_of
from ldm_runtime.errors import BuildError


@dataclass(frozen=True)
class Scaling:
    """How a tensor becomes int8.

    Attributes:
        threshold: the magnitude that becomes 127.
        factors: what its channels are divided by first (float32 [channels]); the weights take them in. None: nothing.
    """

    threshold: float
    factors: NDArray[np.float32] | None = None

    @property
    def scale(self) -> np.float32:
        """Of QuantizeLinear."""
        return np.float32(self.threshold / LEVELS)


def insert_qdq(
    model: ir.Model, sources: Mapping[str, Scaling], results: Mapping[str, Scaling], chosen: Collection[str]
) -> list[str]:
    """Quantize layers of an fp32 graph in place; weights that are no longer used are removed.

    Args:
        model: constants are initialisers.
        sources: tensor that layers read → its scaling.
        results: convolutions' results → their scaling, with factors.
        chosen: names of the layers to quantize.

    Returns:
        The layers that were quantized, in the graph's order.

    Raises:
        BuildError: a chosen layer is unknown, must stay in float, or was not observed.
    """
    graph = model.graph
    layers = {layer.name: layer for layer in find_layers(graph)}
    for name in chosen:
        if name not in layers or layers[name].float_only or layers[name].source not in sources:
            raise BuildError(f"{graph.name}: layer {name!r} cannot be quantized; calibrate this bundle anew")
    nodes = {node.name: node for node in graph}
    done = [layer for layer in layers.values() if layer.name in chosen]
    migrated: dict[str, ir.Value] = {}
    for layer in done:
        _quantize(graph, nodes[layer.name], layer, sources[layer.source], migrated)
    for layer in done:
        if layer.op == "Conv":
            _quantize_result(graph, nodes[layer.name], results[layer.result])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    return [layer.name for layer in done]


def _quantize(graph: ir.Graph, node: ir.Node, layer: Layer, scaling: Scaling, migrated: dict[str, ir.Value]) -> None:
    source, weight = node.inputs[0], node.inputs[1]
    assert source is not None and weight is not None
    weights = weights_of(weight)
    if scaling.factors is not None:
        weights = weights * along(scaling.factors, layer.in_axis, weights.ndim)
        if layer.source not in migrated:
            migrated[layer.source] = _migrate(graph, node, layer, source, scaling.factors)
        source = migrated[layer.source]
    pair, back = _pair(graph, source, scaling.scale, node.name or "")
    graph.insert_before(node, pair)
    node.replace_input_with(0, back)
    held, scales = quantize_weights(weights, layer.out_axis)
    inputs = [
        _constant(graph, f"{node.name}/weight", held),
        _constant(graph, f"{node.name}/weight_scale", scales),
        _constant(graph, f"{node.name}/weight_zero", np.zeros(len(scales), np.int8)),
    ]
    restore = ir.node("DequantizeLinear", inputs, {"axis": layer.out_axis}, name=f"{node.name}/weight/DequantizeLinear")
    restored = _typed(restore.outputs[0], f"{node.name}/weight_float", ir.DataType.FLOAT, ir.Shape(held.shape))
    graph.insert_before(node, restore)
    node.replace_input_with(1, restored)


def along(factors: NDArray[np.float32], axis: int, rank: int) -> NDArray[np.float32]:
    """The factors shaped so that they multiply an array of ``rank`` dimensions along ``axis``."""
    shape = [1] * rank
    shape[axis] = -1
    return factors.reshape(shape)


def _migrate(
    graph: ir.Graph, before: ir.Node, layer: Layer, source: ir.Value, factors: NDArray[np.float32]
) -> ir.Value:
    """The source with its channels divided by the factors, once for all layers that read it."""
    rank = 3 if layer.op == "Conv" else 1
    divisor = _constant(graph, f"{layer.source}/migration", along(1 / factors, 0, rank))
    multiply = ir.node("Mul", [source, divisor], name=f"{layer.source}/migration/Mul")
    graph.insert_before(before, multiply)
    return _typed(multiply.outputs[0], f"{layer.source}/migrated", ir.DataType.FLOAT, source.shape)


def _quantize_result(graph: ir.Graph, node: ir.Node, scaling: Scaling) -> None:
    """Pass a convolution's result through int8, its channels divided by the factors and multiplied with them behind."""
    assert scaling.factors is not None
    restore, result = node.inputs[1], node.outputs[0]
    assert restore is not None
    dequantize = restore.producer()
    assert dequantize is not None and dequantize.inputs[1] is not None
    scales = dequantize.inputs[1].const_value
    assert scales is not None
    dequantize.replace_input_with(
        1, _constant(graph, f"{node.name}/weight_scale_divided", scales.numpy() / scaling.factors)
    )
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        divided = weights_of(bias) / scaling.factors
        node.replace_input_with(2, _constant(graph, f"{node.name}/bias_divided", divided))
    uses = list(result.uses())
    pair, back = _pair(graph, result, scaling.scale, f"{node.name}/result")
    factors = _constant(graph, f"{node.name}/result/factors", along(scaling.factors, 0, 3))
    multiply = ir.node("Mul", [back, factors], name=f"{node.name}/result/Mul")
    graph.insert_after(node, [*pair, multiply])
    whole = _typed(multiply.outputs[0], f"{node.name}/result/whole", ir.DataType.FLOAT, result.shape)
    for user, index in uses:
        user.replace_input_with(index, whole)


def _pair(graph: ir.Graph, value: ir.Value, scale: np.float32, stem: str) -> tuple[list[ir.Node], ir.Value]:
    """A QuantizeLinear and a DequantizeLinear of ``value``, not yet in the graph, and what the latter gives."""
    step = _constant(graph, f"{stem}/scale", np.array(scale))
    zero = _constant(graph, f"{stem}/zero", np.array(0, np.int8))
    forth = ir.node("QuantizeLinear", [value, step, zero], name=f"{stem}/QuantizeLinear")
    held = _typed(forth.outputs[0], f"{stem}/int8", ir.DataType.INT8, value.shape)
    back = ir.node("DequantizeLinear", [held, step, zero], name=f"{stem}/DequantizeLinear")
    return [forth, back], _typed(back.outputs[0], f"{stem}/float", ir.DataType.FLOAT, value.shape)


def _typed(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
    return value


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    value.const_value = ir.tensor(array, name=name)
    graph.initializers[name] = value
    return value
