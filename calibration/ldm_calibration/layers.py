"""Layers of a graph: convolutions and matrix products, the tensors they read, and their number of operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

__all__ = ["Layer", "Shape", "find_layers", "flops"]

Shape = Sequence[int]


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product.

    Attributes:
        name: Name of its node.
        op: "Conv", "MatMul" or "Gemm".
        source: Tensor it reads.
        result: Tensor it computes.
        weight: Initializer of its weights; None for a product of two computed tensors, as in attention.
        out_axis, in_axis: Axes of the weights for output channels and for input channels.
        channel_axis: Axis of ``source`` for input channels.
        float_only: Reason why it is never quantized; empty if it may be quantized.
    """

    name: str
    op: str
    source: str
    result: str
    weight: str | None
    out_axis: int
    in_axis: int
    channel_axis: int
    float_only: str


def find_layers(graph: ir.Graph) -> list[Layer]:
    """Find all convolutions and matrix products of an fp32 graph, in the order of the graph.

    Some layers always stay in float, a few percent of a UNet's operations: products of two computed tensors (in
    attention), convolutions of the graph's input, layers that compute its output, layers with one row per sample (time
    embedding), and grouped convolutions.
    """
    return [_layer(node) for node in graph if node.op_type in ("Conv", "MatMul", "Gemm")]


def _layer(node: ir.Node) -> Layer:
    source, weight = node.inputs[0], node.inputs[1]
    assert source is not None and weight is not None
    constant = weight.is_initializer() and not source.is_initializer()
    rank = len(weight.shape) if weight.shape is not None else 2
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    out_axis, in_axis = (0, 1) if node.op_type == "Conv" or transposed else (rank - 1, rank - 2)
    result = node.outputs[0]
    return Layer(
        node.name or "",
        node.op_type,
        source.name or "",
        result.name or "",
        weight.name if constant else None,
        out_axis,
        in_axis,
        1 if node.op_type == "Conv" else -1,
        _float_only(node, constant),
    )


def _float_only(node: ir.Node, constant: bool) -> str:
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    if not constant:
        return "product of two computed tensors"
    if node.op_type == "Conv" and source.is_graph_input():
        return "first convolution"
    if result.is_graph_output():
        return "last layer"
    if node.op_type == "Gemm":
        return "one row per sample"
    if node.attributes.get_int("group", 1) != 1:
        return "grouped convolution"
    return ""


def flops(layer: Layer, weight_shape: Shape | None, shapes: Mapping[str, Shape]) -> int:
    """Number of operations of one call; a multiply-add counts as two.

    Args:
        layer: A layer of the graph.
        weight_shape: Shape of its weights; None if it has none.
        shapes: Tensor -> its shape in that call; it has ``layer.source`` and ``layer.result``.
    """
    results = prod(shapes[layer.result])
    if layer.op == "Conv":
        assert weight_shape is not None
        return 2 * results * prod(weight_shape[1:])
    return 2 * results * shapes[layer.source][-1]
