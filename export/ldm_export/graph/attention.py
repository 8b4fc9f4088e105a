"""Attention as ONNX Runtime's one operator, which holds no matrix of scores, in place of the products that spell it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "com.microsoft"
"""Of ``MultiHeadAttention``, computed block by block on the CPU (FlashAttention: Dao et al. 2022, arXiv:2205.14135)."""
BY_HEAD = (0, 2, 1, 3)
"""[B, T, heads, width] → [B, heads, T, width] and back."""


@dataclass(frozen=True)
class _Heads:
    """Queries, keys or values before they are told apart by head, [B, T, heads · width], and what scales them."""

    value: ir.Value
    heads: int
    width: int
    scale: float


def fuse_attention(model: ir.Model) -> int:
    """Rewrite, in place, every softmax(s·QKᵀ)V without a mask; one of another form stays as it is.

    Returns:
        How many were rewritten.
    """
    graph = model.graph
    fused = sum(_fuse(graph, node) for node in tuple(graph) if node.op_type == "Softmax")
    if fused:
        model.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)
    return fused


def _fuse(graph: ir.Graph, softmax: ir.Node) -> bool:
    scores, sum_ = _producer(softmax.inputs[0], "MatMul"), _user(softmax, "MatMul")
    back = _user(sum_, "Transpose", BY_HEAD)
    joined = _user(back, "Reshape")
    if scores is None or sum_ is None or joined is None or sum_.inputs[0] is not softmax.outputs[0]:
        return False
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return False
    query, key, value = _heads(scores.inputs[0]), _keys(scores.inputs[1]), _heads(sum_.inputs[1])
    if query is None or key is None or value is None or value.scale != 1:
        return False
    if (query.heads, query.width) != (key.heads, key.width) or query.heads != value.heads:
        return False
    result = joined.outputs[0]
    if result.shape is None or len(result.shape) != 3 or result.shape[2] != value.heads * value.width:
        return False
    node = ir.node(
        "MultiHeadAttention",
        [query.value, key.value, value.value],
        {"num_heads": query.heads, "scale": query.scale * key.scale},
        domain=DOMAIN,
        name=f"{(softmax.name or '').rpartition('/')[0]}/MultiHeadAttention",
    )
    made = node.outputs[0]
    made.name, made.shape, made.type = f"{result.name}/attention", result.shape, result.type
    graph.insert_before(joined, node)
    result.replace_all_uses_with(made)
    return True


def _heads(value: ir.Value | None) -> _Heads | None:
    """What becomes [B, heads, T, width] by a reshape, a transposition and at most a scale."""
    value, scale = _unscaled(value)
    node = _producer(value, "Transpose", BY_HEAD)
    split = _producer(node and node.inputs[0], "Reshape")
    if split is None or (shape := split.outputs[0].shape) is None or len(shape) != 4 or split.inputs[0] is None:
        return None
    heads, width = shape[2], shape[3]
    if not isinstance(heads, int) or not isinstance(width, int) or _width(split.inputs[0]) != heads * width:
        return None
    return _Heads(split.inputs[0], heads, width, scale)


def _keys(value: ir.Value | None) -> _Heads | None:
    """``_heads`` of what is [B, heads, width, T], turned as the exporter writes it: as one batch of matrices."""
    value, scale = _unscaled(value)
    merged = _producer(value, "Reshape")
    turned = _producer(merged and merged.inputs[0], "Transpose", (0, 2, 1))
    split = _producer(turned and turned.inputs[0], "Reshape")
    found = _heads(split and split.inputs[0])
    return found and replace(found, scale=found.scale * scale)


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    node = _producer(value, "Mul")
    constant = node and node.inputs[1]
    if node is None or constant is None or constant.const_value is None or constant.const_value.size != 1:
        return value, 1.0
    return node.inputs[0], float(constant.const_value.numpy().item())


def _producer(value: ir.Value | None, op_type: str, perm: tuple[int, ...] | None = None) -> ir.Node | None:
    """The node that makes a value, if it is of that kind."""
    return _of_kind(value and value.producer(), op_type, perm)


def _user(node: ir.Node | None, op_type: str, perm: tuple[int, ...] | None = None) -> ir.Node | None:
    """The only node that takes a node's result, if it is of that kind."""
    users = [] if node is None else [use.node for use in node.outputs[0].uses()]
    return _of_kind(users[0], op_type, perm) if len(users) == 1 else None


def _of_kind(node: ir.Node | None, op_type: str, perm: tuple[int, ...] | None) -> ir.Node | None:
    if node is None or node.op_type != op_type or node.domain:
        return None
    return node if perm is None or tuple(node.attributes.get_ints("perm", ())) == perm else None


def _width(value: ir.Value) -> int | None:
    size = None if value.shape is None or len(value.shape) != 3 else value.shape[2]
    return size if isinstance(size, int) else None
