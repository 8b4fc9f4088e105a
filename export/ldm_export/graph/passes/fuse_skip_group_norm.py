"""Pass ``fuse_skip_group_norm``: a sum followed by com.microsoft.GroupNorm becomes com.microsoft.SkipGroupNorm.

The operator adds the skip connection, and the bias of the layer before it, while it reads the data for its statistics.

Rules:

1. The pass rewrites an Add of two [B, h, w, C] tensors, or of one and a [B, 1, 1, C] tensor, whose result a GroupNorm
   reads.
2. A bias that was added to an operand (``passes.biases``) moves into the operator, if the operand has no other use.
3. If anything else reads the sum, it reads the operator's second result.
4. Only one GroupNorm of a sum is rewritten. Others that read the same sum are not changed.

Precondition: ``channels_last`` and ``move_transposes`` have run.
"""

from __future__ import annotations

import onnx_ir as ir

from ldm_export.graph.nodes import CONTRIB, constant, equal_shapes, producer, range_names, replace, set_range_names
from ldm_export.graph.passes.biases import sum_of_biases, without_bias
from ldm_export.graph.passes.result import PassResult

__all__ = ["fuse_skip_group_norm"]


def fuse_skip_group_norm(model: ir.Model) -> PassResult:
    """Rewrite in place every sum that matches the rules of this module."""
    changes = sum(
        _fuse(model.graph, node)
        for node in tuple(model.graph)
        if node.op_type == "GroupNorm" and node.domain == CONTRIB and node.graph is not None
    )
    return PassResult(model, changes)


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    add = producer(norm.inputs[0], "Add")
    operands = None if add is None else _operands(add)
    if add is None or operands is None:
        return False
    (data, first), (skip, second) = operands[0], operands[1]
    name, total, normal = norm.name or "", add.outputs[0], norm.outputs[0]
    bias = sum_of_biases(graph, name, [value for value in (first, second) if value is not None])
    inputs = [data, *norm.inputs[1:3], skip, *([bias] if bias is not None else [])]
    shared = total.is_graph_output() or len(list(total.uses())) > 1
    node = ir.Node(
        CONTRIB,
        "SkipGroupNorm",
        inputs,
        attributes=[
            attribute.copy() if hasattr(attribute, "copy") else attribute for attribute in norm.attributes.values()
        ],
        num_outputs=2 if shared else 1,
        name=name.replace("/GroupNorm", "/SkipGroupNorm"),
    )
    for result, original in zip(node.outputs, (normal, total), strict=False):
        result.name, result.type, result.shape = f"{original.name}/skip", original.type, original.shape
        set_range_names(result, range_names(original))
    graph.insert_before(add, node)
    replace(normal, node.outputs[0])
    graph.remove(norm, safe=True)
    if shared:
        replace(total, node.outputs[1])
    return True


def _operands(add: ir.Node) -> tuple[tuple[ir.Value, ir.Value | None], tuple[ir.Value, ir.Value | None]] | None:
    """Return data [B, h, w, C] and its bias, then the skip connection and its bias; None for other sums."""
    left, right = add.inputs
    if left is None or right is None or left.shape is None or right.shape is None:
        return None
    result = add.outputs[0].shape
    for data, skip in ((left, right), (right, left)):
        if (
            skip.shape is not None
            and list(skip.shape)[1:3] == [1, 1]
            and equal_shapes(data.shape, result)
            and skip.shape != result
        ):
            return without_bias(data), (skip, None)
    if equal_shapes(left.shape, right.shape, result) and constant(left) is None and constant(right) is None:
        return without_bias(left), without_bias(right)
    return None
