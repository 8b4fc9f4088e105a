"""The matrix work of a graph: which convolutions and matrix products it has, what they read and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

Shape = Sequence[int]


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product.

    Attributes:
        name: of its node.
        op: "Conv", "MatMul" or "Gemm".
        source: the tensor it reads.
        result: the tensor it gives.
        weight: its weights' initializer; None for a product of two computed tensors, as in attention.
        out_axis, in_axis: the axes of the weights that run over output and over input channels.
        channel_axis: the axis of ``source`` that runs over input channels.
        float_only: why it is never quantized; empty where it may be.
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
    """All matrix work of an fp32 graph in its order.

    In float stay: products of two computed tensors (attention's), convolutions on the graph's input, layers that give
    its output, layers of one row a sample (the time embedding) and grouped convolutions: some percent of a UNet's work.
    """
    return [_layer(node) for node in graph if node.op_type in ("Conv", "MatMul", "Gemm")]


def _layer(node: ir.Node) -> Layer:
    source, weight = node.inputs[0], node.inputs[1]
    assert source is not None and weight is not None
    held = weight.is_initializer() and not source.is_initializer()
    rank = len(weight.shape) if weight.shape is not None else 2
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    out_axis, in_axis = (0, 1) if node.op_type == "Conv" or transposed else (rank - 1, rank - 2)
    result = node.outputs[0]
    return Layer(
        node.name or "",
        node.op_type,
        source.name or "",
        result.name or "",
        weight.name if held else None,
        out_axis,
        in_axis,
        1 if node.op_type == "Conv" else -1,
        _float_only(node, held),
    )


def _float_only(node: ir.Node, held: bool) -> str:
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    if not held:
        return "product of two computed tensors"
    if node.op_type == "Conv" and source.is_graph_input():
        return "first convolution"
    if result.is_graph_output():
        return "last layer"
    if node.op_type == "Gemm":
        return "one row a sample"
    if node.attributes.get_int("group", 1) != 1:
        return "grouped convolution"
    return ""


def flops(layer: Layer, weight_shape: Shape | None, shapes: Mapping[str, Shape]) -> int:
    """Operations of one call, a multiply-add counted as two.

    Args:
        layer: of the graph.
        weight_shape: of its weights; None where it has none.
        shapes: tensor name → its shape in that call; ``layer.source`` and ``layer.result`` are needed.
    """
    results = prod(shapes[layer.result])
    if layer.op == "Conv":
        assert weight_shape is not None
        return 2 * results * prod(weight_shape[1:])
    return 2 * results * shapes[layer.source][-1]
