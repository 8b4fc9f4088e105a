"""Islands: operators of a half-precision graph that stay in fp32 because of structure or measured magnitudes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import numpy as np
import onnx_ir as ir

from ldm_export.graph.nodes import range_names
from ldm_runtime.model import TIMESTEP

__all__ = ["MARGIN", "MATRIX", "computes", "find_islands"]

LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}
SMALLEST = {"fp16": 2.0**-14, "bf16": 2.0**-126}
"""Smallest normal numbers. Smaller values lose more precision than half precision usually does."""
MARGIN = 4.0
"""A tensor whose measured magnitude comes within this factor of the largest half number stays in fp32."""
MATRIX = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NORMALISATIONS = ("InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization")
_MEANS = ("ReduceMean", "ReduceSumSquare", "ReduceL2")
_POINTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Clip", "Reciprocal")
_SOFTMAX = ("Softmax", "LogSoftmax")
_GENERATORS = ("ConstantOfShape", "Range")  # typed by an attribute, or without half-precision kernels
_SELECTIONS = ("ArgMin", "ArgMax", "TopK")
_FACTORS = (*MATRIX, "Mul", "Div")
"""Operators that multiply their first two inputs. A small input keeps them in fp32, however large the other is."""


def find_islands(
    graph: ir.Graph, precision: str, ranges: Mapping[str, float], fp32_inside: Collection[str] = ()
) -> dict[str, str]:
    """Return node name -> reason why the node stays in fp32. All other nodes can compute in half precision.

    Args:
        graph: Graph in fp32. Its constants are initializers, every node has a name and every value a type.
        precision: "fp16" or "bf16".
        ranges: Tensor name -> largest measured magnitude.
        fp32_inside: Operators that the engine computes in fp32 internally, so that they are no islands by structure.
    """
    structure = {node: "sizes" for node in graph if node.op_type in _GENERATORS}
    structure |= _from_integers(graph)
    structure |= {node: "softmax" for node in graph if node.op_type in _SOFTMAX}
    structure |= dict.fromkeys(_statistics(graph), "statistics")
    structure = {node: reason for node, reason in structure.items() if node.op_type not in fp32_inside}
    structure |= dict.fromkeys(_before_selections(graph), "selection")
    reasons = {}

    def magnitude(value: ir.Value | None) -> float:
        return _magnitude(value, ranges)

    for node in filter(computes, graph):
        if reason := structure.get(node) or _out_of_range(node, precision, magnitude):
            reasons[node.name or ""] = reason
    return reasons


def computes(node: ir.Node) -> bool:
    """True if a node computes a float tensor."""
    return any(value.dtype == ir.DataType.FLOAT for value in node.outputs)


def _statistics(graph: ir.Graph) -> set[ir.Node]:
    """Return normalization nodes; of a decomposed one, every node from the first mean to the division."""
    after: set[ir.Node] = set()
    for node in graph:
        behind = node.op_type in (*_POINTWISE, "Sqrt") and any(source in after for source in node.predecessors())
        if node.op_type in _MEANS or behind:
            after.add(node)
    before: set[ir.Node] = set()
    for node in reversed(graph):
        if node.op_type == "Sqrt":
            before.update((node, *(user for user in node.successors() if user.op_type in ("Div", "Reciprocal"))))
        elif node.op_type in (*_POINTWISE, *_MEANS) and any(
            user in before and user.op_type in (*_POINTWISE, *_MEANS, "Sqrt") for user in node.successors()
        ):
            before.add(node)
    always = {node for node in graph if node.op_type in (*_NORMALISATIONS, *_MEANS, "Pow", "Sqrt")}
    return always | (after & before)


def _before_selections(graph: ir.Graph) -> set[ir.Node]:
    """Return all nodes on which a selection depends, e.g. the distances to the codes of quantized latents.

    A rounded distance can select another code, which changes a patch of the image.
    """
    nodes: set[ir.Node] = set()
    for node in reversed(graph):
        if node.op_type in _SELECTIONS or any(user in nodes for user in node.successors()):
            nodes.add(node)
    return nodes


def _from_integers(graph: ir.Graph) -> dict[ir.Node, str]:
    """Return nodes that compute floats only from integers, up to a matrix product or table lookup, and their reason.

    Half precision would round such integers, and fractional timesteps. The reason is "timestep embedding" for nodes
    that depend on the graph's integer inputs or its timestep, and "sizes" for nodes that depend only on shapes.
    """
    reached = {value for value in graph.inputs if value.dtype != ir.DataType.FLOAT or value.name == TIMESTEP}
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        data = node.inputs[:1] if node.op_type == "Expand" else node.inputs  # its second input is only a shape
        sources = [value for value in data if value is not None and not value.is_initializer()]
        if not sources or node.op_type in (*MATRIX, "Gather", "Shape"):
            continue
        exact = (
            value.dtype != ir.DataType.FLOAT or value.producer() in reasons or value.name == TIMESTEP
            for value in sources
        )
        if all(exact):
            if timestep := any(value in reached for value in sources):
                reached.update(node.outputs)
            if computes(node):
                reasons[node] = "timestep embedding" if timestep else "sizes"
    return reasons


def _out_of_range(node: ir.Node, precision: str, magnitude: Callable[[ir.Value | None], float]) -> str | None:
    for value in (*node.inputs, *node.outputs):
        if (largest := magnitude(value)) * MARGIN > LARGEST[precision]:
            return f"range: |{value.name if value else ''}| reaches {largest:.4g}"
    for value in (*(node.inputs[:2] if node.op_type in _FACTORS else ()), *node.outputs):
        if 0 < (largest := magnitude(value)) < SMALLEST[precision]:
            return f"range: |{value.name if value else ''}| is at most {largest:.4g}"
    return None


def _magnitude(value: ir.Value | None, ranges: Mapping[str, float]) -> float:
    if value is None or value.dtype != ir.DataType.FLOAT:
        return 0.0
    if value.is_initializer():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(1)
        return float(np.abs(array).max()) if array.size else 0.0
    return max(ranges.get(name, 0.0) for name in range_names(value))
