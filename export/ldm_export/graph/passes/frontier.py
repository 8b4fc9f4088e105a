"""The cut between what depends on one graph input alone and everything else.

Rules:

1. The cut runs through the float tensors that depend on the input ``source`` alone and that a node reads which depends
   on other inputs too, or on none.
2. All inputs whose first dimension has the same symbol have the same number of rows. Reading that number (Shape of such
   an input, start 0, end 1) is no dependency: the part before the cut can read it from ``source``, the part behind from
   another input.
3. The cut moves towards the input across nodes that only rearrange or scale their data (Reshape, Transpose, Unsqueeze,
   Squeeze, Identity, and Mul by a constant scalar). Tensors therefore cross it in the form in which a layer computes
   them: keys and values as [batch, T, width], projected embeddings as [batch, C].
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["count_rows_of", "depend_on", "fixed_sizes", "frontier"]

LAYOUT = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")
"""Operators that rearrange their first input."""


def frontier(graph: ir.Graph, source: ir.Value) -> list[ir.Value]:
    """The tensors of the cut, in the graph's order; empty if nothing else needs what ``source`` determines."""
    alone = depend_on(graph, source, alone=True)
    values = set()
    for value in (value for node in graph for value in node.outputs if value in alone):
        crosses = value.is_graph_output() or any(use.node.outputs[0] not in alone for use in value.uses())
        if crosses and value.dtype == ir.DataType.FLOAT:
            values.add(_before_layout(value, alone - {source}))
    return [value for node in graph for value in node.outputs if value in values]


def depend_on(graph: ir.Graph, source: ir.Value, alone: bool) -> set[ir.Value]:
    """The values, ``source`` among them, that depend on ``source``, and if ``alone`` on no other input."""
    depends: dict[ir.Value, set[str | None]] = {value: {value.name} for value in graph.inputs}
    for node in graph:
        inputs = [] if _counts_rows(node, source) else [value for value in node.inputs if value is not None]
        sources = set().union(*(depends.get(value, set()) for value in inputs))
        depends.update(dict.fromkeys(node.outputs, sources))
    return {value for value, names in depends.items() if (names == {source.name} if alone else source.name in names)}


def _counts_rows(node: ir.Node, source: ir.Value) -> bool:
    """Rule 2: the node reads the size of the first dimension of an input that has as many rows as ``source``."""
    value = node.inputs[0] if node.op_type == "Shape" else None
    if value is None or not value.is_graph_input() or not value.shape or not source.shape:
        return False
    part = (node.attributes.get_int("start", 0), node.attributes.get_int("end", None))
    return part == (0, 1) and value.shape[0] == source.shape[0]


def _before_layout(value: ir.Value, alone: set[ir.Value]) -> ir.Value:
    """Rule 3: the tensor that a computing layer gives and that ``value`` is a rearrangement of."""
    current, result = value, value
    while (node := current.producer()) is not None and (node.op_type in LAYOUT or _scales(node)):
        data = node.inputs[0]
        if data is None or data not in alone or data.dtype != ir.DataType.FLOAT:
            break
        current = data
        result = current if fixed_sizes(current) is not None else result
    return result


def _scales(node: ir.Node) -> bool:
    factor = node.inputs[1] if node.op_type == "Mul" else None
    return factor is not None and factor.const_value is not None and factor.const_value.size == 1


def fixed_sizes(value: ir.Value) -> tuple[int, ...] | None:
    """The sizes behind the first dimension, if all are fixed and there are any."""
    sizes = tuple(value.shape[1:]) if value.shape is not None else ()
    fixed = tuple(size for size in sizes if isinstance(size, int))
    return fixed if fixed and len(fixed) == len(sizes) else None


def count_rows_of(graph: ir.Graph, source: ir.Value, counted: ir.Value) -> None:
    """Rule 2: let nodes that count rows read them from the input ``counted``: all if it is ``source``, else its own."""
    for node in graph:
        if _counts_rows(node, source) and (counted is source or node.inputs[0] is source):
            node.replace_input_with(0, counted)
