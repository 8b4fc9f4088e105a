"""Functions that find and insert nodes of an ONNX graph, from which graph passes are built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "CONTRIB",
    "clear_range_names",
    "constant",
    "equal_shapes",
    "equal_sizes",
    "initializer",
    "insert",
    "only_user",
    "producer",
    "range_names",
    "replace",
    "set_range_names",
    "transformed",
]

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""
_RANGE_OF = "ldm_export.range_of"


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The array of an initializer; None for any other value."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def producer(
    value: ir.Value | None, op_type: str, perm: tuple[int, ...] | None = None, domain: str = ""
) -> ir.Node | None:
    """Return the node that computes a value, if it has this operator and, for a Transpose, this permutation."""
    return _of_type(None if value is None else value.producer(), op_type, perm, domain)


def only_user(value: ir.Value | None, op_type: str, perm: tuple[int, ...] | None = None) -> ir.Node | None:
    """Return the only node that reads a value, if it has this operator; None if the value is an output of the graph."""
    if value is None or value.is_graph_output():
        return None
    users = [use.node for use in value.uses()]
    return _of_type(users[0], op_type, perm, "") if len(users) == 1 else None


def _of_type(node: ir.Node | None, op_type: str, perm: tuple[int, ...] | None, domain: str) -> ir.Node | None:
    if node is None or node.op_type != op_type or node.domain != domain:
        return None
    return node if perm is None or tuple(node.attributes.get_ints("perm", ())) == perm else None


def equal_sizes(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """True if two sizes of shapes are known to be equal. A free size without a name equals none, not even itself."""
    return one == other and (isinstance(one, int) or one.value is not None)


def equal_shapes(*shapes: ir.Shape | None) -> bool:
    """True if shapes are known to be equal; ``equal_sizes`` compares their dimensions."""
    first, *others = shapes
    return first is not None and all(
        other is not None and len(other) == len(first) and all(map(equal_sizes, first, other)) for other in others
    )


def initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Add an array to the graph under an unused name, or return the initializer that already has that name."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    return _registered(
        graph, ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)), tensor
    )


def transformed(
    graph: ir.Graph, name: str, sources: Sequence[ir.Value], compute: Callable[..., NDArray[Any]], shape: Sequence[int]
) -> ir.Value:
    """Add an initializer that is computed from others. It is computed each time it is read, and not stored.

    Args:
        graph: Graph of the initializers.
        name: Name of the new initializer.
        sources: Initializers.
        compute: Takes the arrays of ``sources`` and returns the new array, of the dtype of the first source.
        shape: Shape of the new array.
    """
    if name in graph.initializers:
        return graph.initializers[name]
    tensors = [source.const_value for source in sources]
    assert all(tensor is not None for tensor in tensors)
    dtype = tensors[0].dtype  # type: ignore[union-attr]

    def load() -> ir.TensorProtocol:
        arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
        return ir.Tensor(np.ascontiguousarray(compute(*arrays)), dtype=dtype, name=name)

    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    return _registered(graph, value, ir.LazyTensor(load, dtype, ir.Shape(shape), name=name))


def _registered(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    value.const_value = tensor
    graph.initializers[value.name or ""] = value
    return value


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    name: str,
    like: ir.Value,
    shape: ir.Shape | None = None,
) -> ir.Value:
    """Insert a node with one result before another node.

    Args:
        before: Node of the graph.
        op_type: Operator, with its domain if it has one, e.g. "com.microsoft.BiasAdd".
        inputs, attributes: See ``onnx_ir.node``.
        name: Name of the node; the result is named "<name>/out".
        like: Value whose type the result has, and whose shape if ``shape`` is not given. The result is assumed to have
            its measured magnitude.
        shape: Shape of the result.

    Returns:
        The result.
    """
    domain, _, operator = op_type.rpartition(".")
    node = ir.node(operator, inputs, dict(attributes or {}), domain=domain, name=name)
    result = node.outputs[0]
    result.name, result.type, result.shape = f"{name}/out", like.type, like.shape if shape is None else shape
    set_range_names(result, range_names(like))
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return result


def replace(value: ir.Value, replacement: ir.Value) -> None:
    """Replace a value in all nodes that read it. If it is an output of the graph, the replacement gets its name."""
    if value.is_graph_output():
        name = value.name
        value.name, replacement.name = f"{name}/replaced", name
    value.replace_all_uses_with(replacement, replace_graph_outputs=True)


def range_names(value: ir.Value) -> tuple[str, ...]:
    """Names of tensors of the exported graph whose measured magnitudes bound this value; by default its own name."""
    names = value.metadata_props.get(_RANGE_OF)
    return tuple(names.split("\n")) if names else (value.name or "",)


def clear_range_names(graph: ir.Graph) -> None:
    """Remove the names that ``set_range_names`` stored, which only passes need, from all values of a graph."""
    computed = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *computed):
        value.metadata_props.pop(_RANGE_OF, None)


def set_range_names(value: ir.Value, names: Sequence[str]) -> None:
    """Set the names of tensors of the exported graph whose measured magnitudes bound this value."""
    value.metadata_props[_RANGE_OF] = "\n".join(dict.fromkeys(names))
