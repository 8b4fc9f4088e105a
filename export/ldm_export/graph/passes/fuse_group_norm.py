"""Pass ``fuse_group_norm``: replace decomposed group normalization by com.microsoft.GroupNorm, SiLU included.

The operator reads and writes channels-last data, computes its statistics in fp32, and replaces up to seven kernels.
Only ONNX Runtime on CUDA runs it.

Rules:

1. The pass rewrites the form in which group normalization is exported: a Reshape to [B, groups, -1], an
   InstanceNormalization with scale 1 and bias 0, a Reshape back, a Mul by a constant [C, 1, 1] and an Add of a constant
   [C, 1, 1]. Each intermediate result has exactly one use.
2. If the result is read by a Sigmoid and by a Mul with that Sigmoid, and by nothing else, both become part of the
   operator (``activation`` 1).
3. The data is [B, C, h, w], or [B, C, T], which becomes [B, 1, T, C] for the operator.
4. Transposes before and after the operator change the layout; ``move_transposes`` removes most of them.
5. The operator needs an even number of channels per group. Other normalizations are not changed, for example 96
   channels in 32 groups.

Precondition: constants are initializers, and values have types and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_export.graph.nodes import CONTRIB, constant, initializer, insert, only_user, producer, replace
from ldm_export.graph.passes.move_transposes import TO_NCHW, TO_NHWC, nhwc
from ldm_export.graph.passes.result import PassResult

__all__ = ["fuse_group_norm"]


@dataclass(frozen=True)
class _GroupNorm:
    """A decomposed group normalization.

    Attributes:
        data: Input [B, C, h, w] or [B, C, T].
        groups, epsilon: Attributes of the operator.
        gamma, beta: float32 [C].
        silu: True if the result includes SiLU.
        last: The last node of the decomposition.
    """

    data: ir.Value
    groups: int
    epsilon: float
    gamma: NDArray[np.float32]
    beta: NDArray[np.float32]
    silu: bool
    last: ir.Node


def fuse_group_norm(model: ir.Model) -> PassResult:
    """Rewrite in place every group normalization that matches the rules of this module."""
    matches = [_match(node) for node in model.graph if node.op_type == "InstanceNormalization"]
    fused = [match for match in matches if match is not None]
    for match in fused:
        _rewrite(model.graph, match)
    if fused:
        model.opset_imports[CONTRIB] = 1
    return PassResult(model, len(fused))


def _match(node: ir.Node) -> _GroupNorm | None:
    split = producer(node.inputs[0], "Reshape")
    joined = only_user(node.outputs[0], "Reshape")
    scaled = only_user(joined.outputs[0], "Mul") if joined else None
    shifted = only_user(scaled.outputs[0], "Add") if scaled else None
    if split is None or scaled is None or shifted is None:
        return None
    data, result = split.inputs[0], shifted.outputs[0]
    scale, bias = constant(node.inputs[1]), constant(node.inputs[2])
    gamma, beta = constant(scaled.inputs[1]), constant(shifted.inputs[1])
    if data is None or data.shape is None or scale is None or bias is None or gamma is None or beta is None:
        return None
    if np.any(scale != 1) or np.any(bias != 0) or len(data.shape) not in (3, 4):
        return None
    channels, groups = data.shape[1], scale.size
    per_channel = (channels, *[1] * (len(data.shape) - 2))
    if not isinstance(channels, int) or gamma.shape != per_channel or beta.shape != per_channel:
        return None
    if channels % (2 * groups):
        return None
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    silu = _silu(result)
    return _GroupNorm(data, groups, epsilon, gamma.ravel(), beta.ravel(), silu is not None, silu or shifted)


def _silu(value: ir.Value) -> ir.Node | None:
    """The Mul that ends ``x * Sigmoid(x)``, if nothing else reads x."""
    users = [use.node for use in value.uses()]
    sigmoid = next((user for user in users if user.op_type == "Sigmoid"), None)
    product = None if sigmoid is None else only_user(sigmoid.outputs[0], "Mul")
    if product is None or value.is_graph_output() or set(product.inputs) != {value, sigmoid and sigmoid.outputs[0]}:
        return None
    return product if {*users} == {sigmoid, product} else None


def _rewrite(graph: ir.Graph, match: _GroupNorm) -> None:
    last, data, result = match.last, match.data, match.last.outputs[0]
    name = (last.name or "").rpartition("/")[0] + f"/{result.name}"
    assert data.shape is not None
    batch, channels, *sides = data.shape
    gamma = initializer(graph, f"{name}/gamma", match.gamma.astype(np.float32))
    beta = initializer(graph, f"{name}/beta", match.beta.astype(np.float32))
    attributes = {
        "epsilon": match.epsilon,
        "groups": match.groups,
        "activation": int(match.silu),
        "channels_last": 1,
    }
    if len(sides) == 2:
        shape = nhwc(data.shape)
        moved = insert(last, "Transpose", [data], {"perm": TO_NHWC}, name=f"{name}/to_nhwc", like=data, shape=shape)
    else:
        axis, shape = initializer(graph, "axis_1", np.array([1], np.int64)), ir.Shape([batch, 1, sides[0], channels])
        tokens = ir.Shape([batch, sides[0], channels])
        moved = insert(last, "Transpose", [data], {"perm": (0, 2, 1)}, name=f"{name}/tokens", like=data, shape=tokens)
        moved = insert(last, "Unsqueeze", [moved, axis], name=f"{name}/unsqueeze", like=data, shape=shape)
    normal = insert(
        last,
        f"{CONTRIB}.GroupNorm",
        [moved, gamma, beta],
        attributes,
        name=f"{name}/GroupNorm",
        like=result,
        shape=shape,
    )
    if len(sides) == 2:
        back = insert(last, "Transpose", [normal], {"perm": TO_NCHW}, name=f"{name}/to_nchw", like=result)
    else:
        normal = insert(last, "Squeeze", [normal, axis], name=f"{name}/squeeze", like=result, shape=tokens)
        back = insert(last, "Transpose", [normal], {"perm": (0, 2, 1)}, name=f"{name}/channels", like=result)
    replace(result, back)
