"""Pass ``fuse_skip_layer_norm``: a sum followed by LayerNormalization becomes com.microsoft.SkipLayerNormalization.

Rules:

1. The pass rewrites an Add of two tensors [B, T, C] of the same shape whose result a LayerNormalization over the last
   axis with constant scale and bias reads.
2. The bias of a MatMul that computes one operand moves into the operator, if the operand has no other use.
3. If anything else reads the sum, it reads the operator's fourth result.

Precondition: values have types and shapes, and constants are initializers.
"""

from __future__ import annotations

import onnx_ir as ir

from ldm_export.graph.nodes import CONTRIB, constant, producer, range_names, replace, set_range_names
from ldm_export.graph.passes.biases import sum_of_biases, without_bias
from ldm_export.graph.passes.result import PassResult

__all__ = ["fuse_skip_layer_norm"]


def fuse_skip_layer_norm(model: ir.Model) -> PassResult:
    """Rewrite in place every sum that matches the rules of this module."""
    changes = sum(
        _fuse(model.graph, node)
        for node in tuple(model.graph)
        if node.op_type == "LayerNormalization" and not node.domain
    )
    if changes:
        model.opset_imports[CONTRIB] = 1
    return PassResult(model, changes)


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    add, normal = producer(norm.inputs[0], "Add"), norm.outputs[0]
    if add is None or len(norm.inputs) != 3 or any(value.uses() for value in norm.outputs[1:]):
        return False
    left, right = add.inputs
    total = add.outputs[0]
    if left is None or right is None or left.shape is None or total.shape is None or len(total.shape) != 3:
        return False
    if not left.shape == (right.shape or ()) == total.shape or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    if constant(norm.inputs[1]) is None or constant(norm.inputs[2]) is None:
        return False
    (data, first), (skip, second) = without_bias(left), without_bias(right)
    name = norm.name or ""
    bias = sum_of_biases(graph, name, [value for value in (first, second) if value is not None])
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    node = ir.Node(
        CONTRIB,
        "SkipLayerNormalization",
        [data, skip, norm.inputs[1], norm.inputs[2], *([bias] if bias is not None else [])],
        attributes=[ir.AttrFloat32("epsilon", float(epsilon))],
        num_outputs=4,
        name=name.replace("/LayerNormalization", "/SkipLayerNormalization"),
    )
    for result in node.outputs[1:3]:  # mean and inverse deviation, which no engine computes
        result.name = ""
    for result, original in ((node.outputs[0], normal), (node.outputs[3], total)):
        result.name, result.type, result.shape = f"{original.name}/skip", original.type, original.shape
        set_range_names(result, range_names(original))
    graph.insert_before(add, node)
    replace(normal, node.outputs[0])
    graph.remove(norm, safe=True)
    replace(total, node.outputs[3])
    return True
