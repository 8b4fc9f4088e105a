"""Pass ``fuse_attention``: replace attention by ONNX Runtime's operator com.microsoft.MultiHeadAttention.

The operator computes attention block by block and never stores the matrix of scores (FlashAttention: Dao et al. 2022,
arXiv:2205.14135). Only ONNX Runtime runs the rewritten graph.

Rules:

1. The pass rewrites softmax(s * Q K^T) V: a MatMul, a Softmax over the last axis, a MatMul, a Transpose by
   (0, 2, 1, 3) and a Reshape to [B, T, heads * width]. Each intermediate result has exactly one use.
2. Q and V are split into heads by a Reshape to [B, T, heads, width] and a Transpose by (0, 2, 1, 3). The graph states
   the number of heads and the width.
3. K is split in the same way and then transposed to [B, heads, width, T] as one batch of matrices: Reshape, Transpose
   by (0, 2, 1), Reshape.
4. Q and K may each be multiplied by a constant scalar; the node's attribute ``scale`` is the product of the scalars. V
   has no factor.
5. Heads may be merged with the batch in between: Q and V become [B * heads, T, width], K becomes its Transpose by
   (0, 2, 1), and the result is split again. Text encoders of this form exist.
6. Attention of any other form is not changed, for example attention with a mask.
7. The new node is named after the module of the Softmax: "<module>/MultiHeadAttention". If
   that name has no module, the whole name takes its place.

Precondition: the values have types and shapes, as ``graph.onnx_graph`` writes them.
Postcondition: no rewritten Softmax is left, and the model imports the domain com.microsoft if the pass rewrote any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ldm_export.graph.nodes import CONTRIB, insert, only_user, producer
from ldm_export.graph.passes.result import PassResult
from ldm_runtime.errors import BuildError

__all__ = ["fuse_attention"]

BY_HEAD = (0, 2, 1, 3)
"""Permutation from [B, T, heads, width] to [B, heads, T, width] and back."""


@dataclass(frozen=True)
class _Heads:
    """Queries, keys or values before they are split into heads.

    Attributes:
        value: Tensor [B, T, heads * width].
        heads: Number of heads.
        width: Channels of one head.
        scale: Constant factor that is applied after the split.
    """

    value: ir.Value
    heads: int
    width: int
    scale: float


def fuse_attention(model: ir.Model) -> PassResult:
    """Rewrite in place every attention that matches the rules of this module.

    Args:
        model: Model with typed values and known shapes.

    Returns:
        The same model, and the number of attentions that were rewritten.

    Raises:
        BuildError: A rewritten Softmax is still in the graph.
    """
    graph = model.graph
    fused = [node for node in tuple(graph) if node.op_type == "Softmax" and _fuse(graph, node)]
    if fused:
        model.opset_imports[CONTRIB] = 1
        RemoveUnusedNodesPass()(model)
    if left := [node.name for node in fused if node.graph is not None]:
        raise BuildError(
            f"{graph.name}: pass fuse_attention: {left[0]!r} is still used after the rewrite, expected no use; "
            "report it with the model's config"
        )
    return PassResult(model, len(fused))


def _fuse(graph: ir.Graph, softmax: ir.Node) -> bool:
    scores, weighted = producer(softmax.inputs[0], "MatMul"), only_user(softmax.outputs[0], "MatMul")
    by_head = _result(weighted)
    split = only_user(by_head, "Reshape")
    if split is not None and _rank(split.outputs[0]) == 4:
        by_head = split.outputs[0]
    transposed = only_user(by_head, "Transpose", BY_HEAD)
    joined = only_user(_result(transposed), "Reshape")
    if scores is None or weighted is None or joined is None or weighted.inputs[0] is not softmax.outputs[0]:
        return False
    if softmax.attributes.get_int("axis", -1) not in (-1, _rank(softmax.outputs[0]) - 1):
        return False
    query, key, value = _heads(scores.inputs[0]), _keys(scores.inputs[1]), _heads(weighted.inputs[1])
    if query is None or key is None or value is None or value.scale != 1:
        return False
    if (query.heads, query.width) != (key.heads, key.width) or query.heads != value.heads:
        return False
    result = joined.outputs[0]
    if result.shape is None or len(result.shape) != 3 or result.shape[2] != value.heads * value.width:
        return False
    name = softmax.name or ""
    attended = insert(
        joined,
        f"{CONTRIB}.MultiHeadAttention",
        [query.value, key.value, value.value],
        {"num_heads": query.heads, "scale": query.scale * key.scale},
        name=f"{name.rpartition('/')[0] or name}/MultiHeadAttention",
        like=result,
    )
    result.replace_all_uses_with(attended)
    return True


def _heads(value: ir.Value | None) -> _Heads | None:
    """Rule 2: return the tensor that becomes [B, heads, T, width] by a Reshape, a Transpose and maybe a factor."""
    value, scale = _without_scale(value)
    merged = producer(value, "Reshape")
    if merged is not None and _rank(value) == 3 and _rank(merged.inputs[0]) == 4:
        value = merged.inputs[0]
    node = producer(value, "Transpose", BY_HEAD)
    split = producer(_data(node), "Reshape")
    if split is None or (shape := split.outputs[0].shape) is None or len(shape) != 4 or split.inputs[0] is None:
        return None
    heads, width = shape[2], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int) or _width(split.inputs[0]) != heads * width:
        return None
    return _Heads(split.inputs[0], heads, width, scale)


def _keys(value: ir.Value | None) -> _Heads | None:
    """Rule 3: the same as ``_heads`` for a tensor that is transposed to [B, heads, width, T]."""
    value, scale = _without_scale(value)
    turned = producer(value, "Transpose", (0, 2, 1)) or producer(
        _data(producer(value, "Reshape")), "Transpose", (0, 2, 1)
    )
    heads = _heads(_data(turned))
    return heads and replace(heads, scale=heads.scale * scale)


def _without_scale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Rule 4: return the tensor and the constant scalar by which it is multiplied."""
    node = producer(value, "Mul")
    constant = None if node is None else node.inputs[1]
    if node is None or constant is None or constant.const_value is None or constant.const_value.size != 1:
        return value, 1.0
    return node.inputs[0], float(constant.const_value.numpy().item())


def _data(node: ir.Node | None) -> ir.Value | None:
    return None if node is None else node.inputs[0]


def _result(node: ir.Node | None) -> ir.Value | None:
    return None if node is None else node.outputs[0]


def _rank(value: ir.Value | None) -> int:
    """Number of dimensions; 0 if they are not known."""
    return 0 if value is None or value.shape is None else len(value.shape)


def _width(value: ir.Value) -> int | None:
    size = None if value.shape is None or len(value.shape) != 3 else value.shape[2]
    return size if isinstance(size, int) else None
