"""Inserts explicit QuantizeLinear and DequantizeLinear operators into a graph around the layers to quantize.

The same graph runs on ONNX Runtime, OpenVINO and TensorRT, because:

1. Quantization is symmetric int8 with zero point 0: one scale for each tensor, and one for each output channel of
   weights. TensorRT accepts no other zero point.
2. Biases stay in float: TensorRT refuses int32 biases; ONNX Runtime and OpenVINO quantize biases themselves.
3. Each layer reads its input through its own pair of operators, even if several layers read the same tensor. ONNX
   Runtime converts int8 to the uint8 of its kernels only if one DequantizeLinear reads a QuantizeLinear; the other
   engines merge equal pairs.
4. The result of a convolution also passes through a pair, because otherwise ONNX Runtime computes the convolution in
   float. Before the pair, the channels are scaled to one magnitude, which only changes the scales of the weights and
   the bias; after the pair, a multiplication restores them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_calibration.layers import Layer, find_layers
from ldm_calibration.weights import LEVELS, quantize_weights, weights_of
from ldm_runtime.errors import BuildError

__all__ = ["QuantizedTensors", "Scaling", "along", "insert_qdq"]


@dataclass(frozen=True)
class Scaling:
    """Scaling of a tensor to int8.

    Attributes:
        threshold: Magnitude that becomes 127.
        factors: Factors float32 [channels] by which the channels are divided before; the weights are multiplied by
            them. None means no factors.
    """

    threshold: float
    factors: NDArray[np.float32] | None = None

    @property
    def scale(self) -> np.float32:
        """Scale of QuantizeLinear."""
        return np.float32(self.threshold / LEVELS)


@dataclass(frozen=True)
class QuantizedTensors:
    """Scalings of the tensors of a graph.

    Attributes:
        sources: Tensor that layers read -> its scaling.
        results: Result of a convolution -> its scaling, with factors.
    """

    sources: Mapping[str, Scaling]
    results: Mapping[str, Scaling]


def insert_qdq(model: ir.Model, tensors: QuantizedTensors, chosen: Collection[str]) -> list[str]:
    """Quantize layers of an fp32 graph in place, and remove weights that are no longer used.

    Args:
        model: Model whose constants are initializers.
        tensors: Scalings of the graph's tensors.
        chosen: Names of the layers to quantize.

    Returns:
        The layers that were quantized, in the order of the graph.

    Raises:
        BuildError: A chosen layer is unknown, must stay in float, was not observed, or has another number of channels
            than the factors of its scalings.
    """
    graph, sources, results = model.graph, tensors.sources, tensors.results
    layers = {layer.name: layer for layer in find_layers(graph)}
    nodes = {node.name: node for node in graph}
    for name in chosen:
        layer = layers.get(name)
        if layer is None or layer.float_only or not _scaled(nodes[name], layer, tensors):
            raise BuildError(f"{graph.name}: layer {name!r} cannot be quantized; calibrate this bundle again")
    done = [layer for layer in layers.values() if layer.name in chosen]
    smoothed: dict[str, ir.Value] = {}
    for layer in done:
        _quantize(graph, nodes[layer.name], layer, sources[layer.source], smoothed)
    for layer in done:
        if layer.op == "Conv":
            _quantize_result(graph, nodes[layer.name], results[layer.result])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    return [layer.name for layer in done]


def _scaled(node: ir.Node, layer: Layer, tensors: QuantizedTensors) -> bool:
    """True if the tensors of a layer have scalings with a factor for each channel."""
    weight, source, result = node.inputs[1], tensors.sources.get(layer.source), tensors.results.get(layer.result)
    if weight is None or source is None:
        return False
    shape = weights_of(weight).shape
    if source.factors is not None and len(source.factors) != shape[layer.in_axis]:
        return False
    if layer.op != "Conv":
        return True
    return result is not None and result.factors is not None and len(result.factors) == shape[layer.out_axis]


def _quantize(graph: ir.Graph, node: ir.Node, layer: Layer, scaling: Scaling, smoothed: dict[str, ir.Value]) -> None:
    source, weight = node.inputs[0], node.inputs[1]
    assert source is not None and weight is not None
    weights = weights_of(weight)
    if scaling.factors is not None:
        weights = weights * along(scaling.factors, layer.in_axis, weights.ndim)
        if layer.source not in smoothed:
            smoothed[layer.source] = _smooth(graph, node, layer, source, scaling.factors)
        source = smoothed[layer.source]
    pair, back = _pair(graph, source, scaling.scale, node.name or "")
    graph.insert_before(node, pair)
    node.replace_input_with(0, back)
    quantized, scales = quantize_weights(weights, layer.out_axis)
    inputs = [
        _constant(graph, f"{node.name}/weight", quantized),
        _constant(graph, f"{node.name}/weight_scale", scales),
        _constant(graph, f"{node.name}/weight_zero", np.zeros(len(scales), np.int8)),
    ]
    restore = ir.node("DequantizeLinear", inputs, {"axis": layer.out_axis}, name=f"{node.name}/weight/DequantizeLinear")
    restored = _typed(restore.outputs[0], f"{node.name}/weight_float", ir.DataType.FLOAT, ir.Shape(quantized.shape))
    graph.insert_before(node, restore)
    node.replace_input_with(1, restored)


def along(factors: NDArray[np.float32], axis: int, rank: int) -> NDArray[np.float32]:
    """Reshape factors so that they multiply an array of ``rank`` dimensions along ``axis``."""
    shape = [1] * rank
    shape[axis] = -1
    return factors.reshape(shape)


def _smooth(graph: ir.Graph, before: ir.Node, layer: Layer, source: ir.Value, factors: NDArray[np.float32]) -> ir.Value:
    """Divide the channels of the source by the factors, once for all layers that read it."""
    rank = 3 if layer.op == "Conv" else 1
    divisor = _constant(graph, f"{layer.source}/smoothing", along(np.float32(1) / factors, 0, rank))
    multiply = ir.node("Mul", [source, divisor], name=f"{layer.source}/smoothing/Mul")
    graph.insert_before(before, multiply)
    return _typed(multiply.outputs[0], f"{layer.source}/smoothed", ir.DataType.FLOAT, source.shape)


def _quantize_result(graph: ir.Graph, node: ir.Node, scaling: Scaling) -> None:
    """Quantize a convolution's result: divide its channels by the factors before, and multiply by them after."""
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
    """Create a QuantizeLinear and a DequantizeLinear of ``value`` outside the graph; return them and their result."""
    step = _constant(graph, f"{stem}/scale", np.array(scale))
    zero = _constant(graph, f"{stem}/zero", np.array(0, np.int8))
    forth = ir.node("QuantizeLinear", [value, step, zero], name=f"{stem}/QuantizeLinear")
    quantized = _typed(forth.outputs[0], f"{stem}/int8", ir.DataType.INT8, value.shape)
    back = ir.node("DequantizeLinear", [quantized, step, zero], name=f"{stem}/DequantizeLinear")
    return [forth, back], _typed(back.outputs[0], f"{stem}/float", ir.DataType.FLOAT, value.shape)


def _typed(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
    return value


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    value.const_value = ir.tensor(array, name=name)
    graph.initializers[name] = value
    return value
