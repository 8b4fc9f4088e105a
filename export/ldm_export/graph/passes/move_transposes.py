"""Pass ``move_transposes``: move Transposes towards the graph's outputs until they meet and cancel.

Rules, applied until none changes the graph:

1. A Transpose of a Transpose that restores the first one's input is replaced by that input.
2. Equal Transposes of one value become one.
3. An elementwise operator on the result of a Transpose to [B, C, h, w] runs before it, on [B, h, w, C]. Its other
   operands are results of such Transposes too, constants that broadcast over the image, or tensors [B, C, 1, 1].
4. The same holds for Concat and Split along the channels.
5. Shape of a transposed value reads the shape of the original value and selects its entries.
6. A Reshape of a transposed image to [B, C, h * w] becomes a Reshape to [B, h * w, C] and a Transpose.
7. A Reshape of [B, C, T] to [B, C, h, w] behind a Transpose by (0, 2, 1) becomes a Reshape of the Transpose's input to
   [B, h, w, C] and a Transpose.

Precondition: values have types and shapes; constants are initializers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ldm_export.graph.nodes import (
    constant,
    equal_sizes,
    initializer,
    insert,
    producer,
    range_names,
    replace,
    set_range_names,
)
from ldm_export.graph.passes.result import PassResult

__all__ = ["TO_NCHW", "TO_NHWC", "move_transposes", "nhwc"]

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
"""Permutations from [B, C, h, w] to [B, h, w, C] and back."""
_SWAP = (0, 2, 1)
_ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Sigmoid", "Tanh", "Relu", "Clip", "Cast", "Erf", "Gelu", "Identity", "Neg", "Sqrt")
)


def nhwc(shape: ir.Shape) -> ir.Shape:
    """The shape [B, h, w, C] of data of shape [B, C, h, w]."""
    return ir.Shape([shape[axis] for axis in TO_NHWC])


def move_transposes(model: ir.Model) -> PassResult:
    """Apply the rules of this module in place; ``changes`` counts how often a rule was applied."""
    changes = 0
    while applied := sum(_apply(model.graph, node) for node in tuple(model.graph) if node.graph is not None):
        changes += applied
        RemoveUnusedNodesPass()(model)
    return PassResult(model, changes)


def _apply(graph: ir.Graph, node: ir.Node) -> bool:
    if node.domain or not any(value.uses() or value.is_graph_output() for value in node.outputs):
        return False
    if node.op_type == "Transpose":
        return _cancel(node) or _share(node)
    if node.op_type in _ELEMENTWISE:
        return _elementwise(graph, node)
    if node.op_type == "Concat":
        return _concat(node)
    if node.op_type == "Split":
        return _split(node)
    if node.op_type == "Shape":
        return _shape(graph, node)
    if node.op_type == "Reshape":
        return _merge_sides(graph, node) or _divide_sides(graph, node)
    return False


def _cancel(node: ir.Node) -> bool:
    """Rule 1."""
    source = None if node.inputs[0] is None else producer(node.inputs[0], "Transpose")
    if source is None:
        return False
    first, second = (list(one.attributes.get_ints("perm", ())) for one in (source, node))
    if [first[axis] for axis in second] != list(range(len(first))):
        return False
    original = source.inputs[0]
    assert original is not None
    if node.outputs[0].is_graph_output() and (original.producer() is None or original.is_graph_output()):
        return False
    replace(node.outputs[0], original)
    return True


def _share(node: ir.Node) -> bool:
    """Rule 2: replace the later of two equal Transposes by the earlier one."""
    assert node.inputs[0] is not None and node.graph is not None
    for use in node.inputs[0].uses():
        other = use.node
        if other is node or other.op_type != "Transpose" or other.outputs[0].is_graph_output():
            continue
        if other.attributes["perm"].value == node.attributes["perm"].value and _precedes(node, other):
            other.outputs[0].replace_all_uses_with(node.outputs[0])
            node.graph.remove(other, safe=True)
            return True
    return False


def _precedes(first: ir.Node, second: ir.Node) -> bool:
    assert first.graph is not None
    return next(node for node in first.graph if node is first or node is second) is first


def _elementwise(graph: ir.Graph, node: ir.Node) -> bool:
    """Rule 3."""
    result = node.outputs[0]
    if result.shape is None or len(result.shape) != 4 or not any(_original(value) for value in node.inputs):
        return False
    if not all(value is None or _has_nhwc(value) for value in node.inputs):
        return False
    operands = [None if value is None else _nhwc_operand(graph, node, value) for value in node.inputs]
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    moved = insert(
        node, node.op_type, operands, attributes, name=f"{node.name}/nhwc", like=result, shape=nhwc(result.shape)
    )
    _transpose_back(node, moved, result)
    return True


def _original(value: ir.Value | None) -> ir.Value | None:
    """Return the channels-last input of a Transpose to [B, C, h, w]."""
    source = producer(value, "Transpose", TO_NCHW)
    return None if source is None else source.inputs[0]


def _has_nhwc(value: ir.Value) -> bool:
    if _original(value) is not None:
        return True
    if value.is_initializer() and value.shape is not None:
        return all(isinstance(size, int) for size in value.shape)
    return _is_per_channel(value) and isinstance(value.shape[1] if value.shape else None, int)


def _is_per_channel(value: ir.Value) -> bool:
    """True if a value is [B, C, 1, 1]."""
    return value.shape is not None and len(value.shape) == 4 and list(value.shape)[2:] == [1, 1]


def _nhwc_operand(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    if (original := _original(value)) is not None:
        return original
    if not value.is_initializer():
        assert value.shape is not None
        batch, channels = value.shape[0], value.shape[1]
        target = initializer(graph, f"row_{channels}", np.array([0, 1, 1, int(str(channels))], np.int64))
        shape = ir.Shape([batch, 1, 1, channels])
        return insert(before, "Reshape", [value, target], name=f"{before.name}/row", like=value, shape=shape)
    array = constant(value)
    assert array is not None
    if array.size == 1:
        return value
    full = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return initializer(graph, f"{value.name}/nhwc", full.transpose(TO_NHWC))


def _transpose_back(before: ir.Node, moved: ir.Value, result: ir.Value) -> None:
    back = insert(before, "Transpose", [moved], {"perm": TO_NCHW}, name=f"{before.name}/to_nchw", like=result)
    replace(result, back)


def _concat(node: ir.Node) -> bool:
    """Rule 4."""
    result, originals = node.outputs[0], [_original(value) for value in node.inputs]
    if result.shape is None or len(result.shape) != 4 or node.attributes.get_int("axis") not in (1, -3):
        return False
    if not all(originals):
        return False
    moved = insert(
        node, "Concat", originals, {"axis": 3}, name=f"{node.name}/nhwc", like=result, shape=nhwc(result.shape)
    )
    _transpose_back(node, moved, result)
    return True


def _split(node: ir.Node) -> bool:
    """Rule 4."""
    original = _original(node.inputs[0])
    if original is None or node.attributes.get_int("axis", 0) not in (1, -3) or node.graph is None:
        return False
    attributes = {key: attribute.value for key, attribute in node.attributes.items()} | {"axis": 3}
    moved = ir.node(
        "Split", [original, *node.inputs[1:]], attributes, num_outputs=len(node.outputs), name=f"{node.name}/nhwc"
    )
    node.graph.insert_before(node, moved)
    for index, (part, result) in enumerate(zip(moved.outputs, node.outputs, strict=True)):
        assert result.shape is not None
        part.name, part.type, part.shape = f"{node.name}/nhwc/{index}", result.type, nhwc(result.shape)
        set_range_names(part, range_names(result))
        back = insert(node, "Transpose", [part], {"perm": TO_NCHW}, name=f"{node.name}/to_nchw_{index}", like=result)
        replace(result, back)
    return True


def _shape(graph: ir.Graph, node: ir.Node) -> bool:
    """Rule 5."""
    source = None if node.inputs[0] is None else producer(node.inputs[0], "Transpose")
    if source is None:
        return False
    perm = list(source.attributes.get_ints("perm", ()))
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(perm))
    entries = perm[start:end]
    order = initializer(graph, f"order_{'_'.join(map(str, entries))}", np.array(entries, np.int64))
    result = node.outputs[0]
    whole = insert(
        node, "Shape", [source.inputs[0]], name=f"{node.name}/whole", like=result, shape=ir.Shape([len(perm)])
    )
    selected = insert(node, "Gather", [whole, order], {"axis": 0}, name=f"{node.name}/selected", like=result)
    replace(result, selected)
    return True


def _merge_sides(graph: ir.Graph, node: ir.Node) -> bool:
    """Rule 6."""
    original, result = _original(node.inputs[0]), node.outputs[0]
    if original is None or original.shape is None or result.shape is None or len(result.shape) != 3:
        return False
    channels = original.shape[3]
    if not isinstance(channels, int) or result.shape[1] != channels:
        return False
    if not equal_sizes(result.shape[0], original.shape[0]):
        return False
    target = initializer(graph, f"tokens_{channels}", np.array([0, -1, channels], np.int64))
    shape = ir.Shape([result.shape[0], result.shape[2], channels])
    tokens = insert(node, "Reshape", [original, target], name=f"{node.name}/tokens", like=result, shape=shape)
    back = insert(node, "Transpose", [tokens], {"perm": _SWAP}, name=f"{node.name}/channels", like=result)
    replace(result, back)
    return True


def _divide_sides(graph: ir.Graph, node: ir.Node) -> bool:
    """Rule 7."""
    swapped, result = producer(node.inputs[0], "Transpose", _SWAP), node.outputs[0]
    tokens = None if swapped is None else swapped.inputs[0]
    if tokens is None or tokens.shape is None or result.shape is None or len(result.shape) != 4:
        return False
    if not equal_sizes(result.shape[1], tokens.shape[2]) or not equal_sizes(result.shape[0], tokens.shape[0]):
        return False
    if node.inputs[1] is None:
        return False
    order = initializer(graph, "nhwc_order", np.array(TO_NHWC, np.int64))
    sizes = insert(node, "Gather", [node.inputs[1], order], {"axis": 0}, name=f"{node.name}/sizes", like=node.inputs[1])
    image = insert(node, "Reshape", [tokens, sizes], name=f"{node.name}/nhwc", like=result, shape=nhwc(result.shape))
    _transpose_back(node, image, result)
    return True
