"""Pass ``fuse_bias``: fuse biases with later operators into com.microsoft.BiasSplitGelu and BiasAdd.

Rules:

1. GEGLU, that is a bias, a Split into two halves, a Gelu of the second and their product, becomes one BiasSplitGelu.
   Its kernel exists only for the sizes in SPLIT_GELU_SIZES; other sizes are not changed.
2. A bias and the sum with a tensor of the same shape become one BiasAdd. The operator takes [B, T, C]; an image
   [B, h, w, C] is reshaped to it and back.
3. A bias is only fused if nothing else reads the biased value (``passes.biases``).

Precondition: the passes that fuse normalization have run, because they also fuse biases.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ldm_export.graph.nodes import CONTRIB, constant, equal_shapes, initializer, insert, only_user, producer, replace
from ldm_export.graph.passes.biases import sum_of_biases, without_bias
from ldm_export.graph.passes.result import PassResult

__all__ = ["SPLIT_GELU_SIZES", "fuse_bias"]

SPLIT_GELU_SIZES = frozenset((2560, 5120, 6144, 10240, 12288))
"""Channels before the split for which ONNX Runtime's BiasSplitGelu has a CUDA kernel."""


def fuse_bias(model: ir.Model) -> PassResult:
    """Rewrite in place every bias that matches the rules of this module."""
    changes = 0
    for node in tuple(model.graph):
        if node.op_type == "Split" and not node.domain:
            changes += _split_gelu(node)
    for node in tuple(model.graph):
        if node.op_type == "Add" and not node.domain and node.graph is not None:
            changes += _bias_add(model.graph, node)
    if changes:
        model.opset_imports[CONTRIB] = 1
    return PassResult(model, changes)


def _split_gelu(split: ir.Node) -> bool:
    """Rule 1."""
    biased = split.inputs[0]
    if biased is None or biased.shape is None or len(split.outputs) != 2 or len(biased.shape) != 3:
        return False
    if biased.shape[2] not in SPLIT_GELU_SIZES or split.attributes.get_int("axis", 0) not in (2, -1):
        return False
    gelu = only_user(split.outputs[1], "Gelu")
    product = None if gelu is None else only_user(gelu.outputs[0], "Mul")
    if gelu is None or product is None or gelu.attributes.get_string("approximate", "none") != "none":
        return False
    if only_user(split.outputs[0], "Mul") is not product:
        return False
    data, bias = without_bias(biased)
    if bias is None:
        return False
    result = product.outputs[0]
    name = f"{gelu.name}/BiasSplitGelu"
    fused = insert(product, f"{CONTRIB}.BiasSplitGelu", [data, bias], name=name, like=result)
    replace(result, fused)
    return True


def _bias_add(graph: ir.Graph, add: ir.Node) -> bool:
    """Rule 2."""
    left, right = add.inputs
    result = add.outputs[0]
    if left is None or right is None or left.shape is None or result.shape is None or len(result.shape) not in (3, 4):
        return False
    if (
        not equal_shapes(left.shape, right.shape, result.shape)
        or constant(left) is not None
        or constant(right) is not None
    ):
        return False
    if len(result.shape) == 4 and not (_is_channels_last(left) or _is_channels_last(right)):
        return False
    (data, first), (skip, second) = without_bias(left), without_bias(right)
    bias = sum_of_biases(graph, add.name or "", [value for value in (first, second) if value is not None])
    if bias is None:
        return False
    name = f"{add.name}/BiasAdd"
    if len(result.shape) == 3:
        fused = insert(add, f"{CONTRIB}.BiasAdd", [data, bias, skip], name=name, like=result)
    else:
        channels = result.shape[3]
        target = initializer(graph, f"tokens_{channels}", np.array([0, -1, int(str(channels))], np.int64))
        shape = ir.Shape([result.shape[0], None, channels])
        tokens = [
            insert(add, "Reshape", [value, target], name=f"{name}/tokens_{index}", like=value, shape=shape)
            for index, value in enumerate((data, skip))
        ]
        added = insert(add, f"{CONTRIB}.BiasAdd", [tokens[0], bias, tokens[1]], name=name, like=result, shape=shape)
        sizes = insert(add, "Shape", [skip], name=f"{name}/sizes", like=target, shape=ir.Shape([4]))
        fused = insert(add, "Reshape", [added, sizes], name=f"{name}/image", like=result)
    replace(result, fused)
    return True


def _is_channels_last(value: ir.Value) -> bool:
    """True if a rank-4 value is [B, h, w, C], because it comes from a channels-last convolution or matrix product."""
    add = producer(value, "Add")
    product = value if add is None else add.inputs[0]
    return producer(value, "NhwcConv", domain=CONTRIB) is not None or producer(product, "MatMul") is not None
