"""Pass ``fuse_skip_layer_norm``: a sum followed by LayerNormalization becomes com.microsoft.SkipLayerNormalization.

Rules:

1. The pass rewrites an Add of two tensors [B, T, C] of the same shape whose result a LayerNormalization over the last
   axis with constant scale and bias reads.
2. The bias of a MatMul that computes one operand moves into the operator, if the operand has no other use.
3. If anything else reads the sum, it reads the operator's fourth result.
4. A LayerNormalization that reads a value [B, T, C] plus a bias is rewritten too, with zeros [T, C] as the second
   operand: ONNX Runtime's kernel of SkipLayerNormalization is faster than those of Add and LayerNormalization. A
   Reshape to [B, T, C] may lie between the bias and the normalization. Values of the same shape share the zeros.

Precondition: values have types and shapes, and constants are initializers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ldm_export.graph.nodes import (
    CONTRIB,
    constant,
    equal_shapes,
    equal_sizes,
    initializer,
    insert,
    only_user,
    producer,
    range_names,
    replace,
    set_range_names,
)
from ldm_export.graph.passes.biases import is_vector, sum_of_biases, without_bias
from ldm_export.graph.passes.result import PassResult

__all__ = ["fuse_skip_layer_norm"]

Zeros = dict[tuple[str, str], ir.Value]
"""Number of tokens and of channels -> zeros of this shape."""


def fuse_skip_layer_norm(model: ir.Model) -> PassResult:
    """Rewrite in place every sum that matches the rules of this module."""
    zeros: Zeros = {}
    changes = sum(
        _fuse(model.graph, node, zeros)
        for node in tuple(model.graph)
        if node.op_type == "LayerNormalization" and not node.domain
    )
    if changes:
        model.opset_imports[CONTRIB] = 1
    return PassResult(model, changes)


def _fuse(graph: ir.Graph, norm: ir.Node, zeros: Zeros) -> bool:
    total, normal = norm.inputs[0], norm.outputs[0]
    last = None if total is None else total.producer()
    if total is None or last is None or len(norm.inputs) != 3 or any(value.uses() for value in norm.outputs[1:]):
        return False
    if total.shape is None or len(total.shape) != 3 or norm.attributes.get_int("axis", -1) not in (-1, 2):
        return False
    if constant(norm.inputs[1]) is None or constant(norm.inputs[2]) is None:
        return False
    name = norm.name or ""
    operands = _summands(graph, last, name) or _biased(graph, last, name, zeros)
    if operands is None:
        return False
    data, skip, bias = operands
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
    graph.insert_before(last, node)
    replace(normal, node.outputs[0])
    graph.remove(norm, safe=True)
    replace(total, node.outputs[3])
    return True


def _summands(graph: ir.Graph, add: ir.Node, name: str) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """Rules 1 and 2: the two operands of a sum, and their bias; None if it is no such sum."""
    left, right = add.inputs[:2] if add.op_type == "Add" and not add.domain else (None, None)
    if left is None or right is None or not equal_shapes(left.shape, right.shape, add.outputs[0].shape):
        return None
    (data, first), (skip, second) = without_bias(left), without_bias(right)
    return data, skip, sum_of_biases(graph, name, [value for value in (first, second) if value is not None])


def _biased(
    graph: ir.Graph, last: ir.Node, name: str, zeros: Zeros
) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """Rule 4: a value, zeros, and the bias of the value; ``last`` adds the bias, or reshapes the biased value."""
    total = last.outputs[0]
    reshape = last if last.op_type == "Reshape" and not last.domain else None
    biased = total if reshape is None else reshape.inputs[0]
    add = producer(biased, "Add")
    if biased is None or add is None or biased.shape is None or total.shape is None:
        return None
    channels = total.shape[-1]
    if reshape is not None and (only_user(biased, "Reshape") is None or not equal_sizes(biased.shape[-1], channels)):
        return None
    for data, bias in (add.inputs[:2], add.inputs[1::-1]):
        if data is None or bias is None or not is_vector(bias):
            continue
        if equal_shapes(data.shape, biased.shape) and equal_shapes(bias.shape, ir.Shape([channels])):
            if reshape is not None:
                inputs = [data, reshape.inputs[1]]
                data = insert(reshape, "Reshape", inputs, name=f"{name}/tokens", like=data, shape=total.shape)
            return data, _zeros(graph, last, data, name, zeros), bias
    return None


def _zeros(graph: ir.Graph, before: ir.Node, like: ir.Value, name: str, zeros: Zeros) -> ir.Value:
    """Zeros [T, C] for a value [B, T, C]."""
    assert like.shape is not None
    tokens, channels = like.shape[1], like.shape[2]
    key = str(tokens), str(channels)
    if key not in zeros or key[0] == "None":
        zero = initializer(graph, "zero", np.zeros((1, 1), np.float32))
        pair = ir.Value(type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([2]))
        sizes = insert(before, "Shape", [like], {"start": 1}, name=f"{name}/zeros/sizes", like=pair)
        shape = ir.Shape([tokens, channels])
        zeros[key] = insert(before, "Expand", [zero, sizes], name=f"{name}/zeros", like=like, shape=shape)
    return zeros[key]
