"""Finds the cut between the part of a graph that depends only on certain inputs, and the rest.

Rules:

1. The tensors of the cut are float tensors that depend only on the inputs ``sources``, and are read by a node that also
   depends on other inputs or does not depend on inputs.
2. All inputs whose first dimension has the same symbol have the same number of rows. Reading that number (Shape of such
   an input, start 0, end 1) does not count as a dependency: the part before the cut can read it from a source, the part
   after the cut from another input.
3. The cut moves towards the inputs across nodes that only rearrange or scale their data (Reshape, Transpose, Unsqueeze,
   Squeeze, Identity, and Mul by a constant scalar). Tensors therefore cross it in the form in which a layer computes
   them: keys and values as [batch, T, width], projected embeddings as [batch, C].
4. Every dimension after the first is fixed, or has the symbol of such a dimension of a source, e.g. the tokens T.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

__all__ = ["Sizes", "count_rows_of", "depend_on", "frontier", "known_sizes"]

Sizes = tuple[int | str, ...]
"""Sizes of dimensions, or their symbols."""

LAYOUT = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")
"""Operators that rearrange their first input."""


def frontier(graph: ir.Graph, sources: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the tensors of the cut in the graph's order; empty if no other node needs what ``sources`` determine."""
    alone = depend_on(graph, sources, alone=True)
    values = set()
    for value in (value for node in graph for value in node.outputs if value in alone):
        crosses = value.is_graph_output() or any(use.node.outputs[0] not in alone for use in value.uses())
        if crosses and value.dtype == ir.DataType.FLOAT:
            values.add(_before_layout(value, alone - set(sources), sources))
    return [value for node in graph for value in node.outputs if value in values]


def depend_on(graph: ir.Graph, sources: Sequence[ir.Value], alone: bool) -> set[ir.Value]:
    """Return the values, including ``sources``, that depend on a source and, if ``alone``, on no other input."""
    searched = {value.name for value in sources}
    depends: dict[ir.Value, set[str | None]] = {value: {value.name} for value in graph.inputs}
    for node in graph:
        inputs = [] if _counts_rows(node, sources) else [value for value in node.inputs if value is not None]
        found = set().union(*(depends.get(value, set()) for value in inputs))
        depends.update(dict.fromkeys(node.outputs, found))
    return {value for value, names in depends.items() if names & searched and not (alone and names - searched)}


def _counts_rows(node: ir.Node, sources: Sequence[ir.Value]) -> bool:
    """Rule 2: the node reads the size of the first dimension of an input that has as many rows as the sources."""
    value = node.inputs[0] if node.op_type == "Shape" else None
    if value is None or not value.is_graph_input() or not value.shape or not sources[0].shape:
        return False
    part = (node.attributes.get_int("start", 0), node.attributes.get_int("end", None))
    return part == (0, 1) and value.shape[0] == sources[0].shape[0]


def _before_layout(value: ir.Value, alone: set[ir.Value], sources: Sequence[ir.Value]) -> ir.Value:
    """Rule 3: return the output of a computing layer of which ``value`` is a rearrangement."""
    current, result = value, value
    while (node := current.producer()) is not None and (node.op_type in LAYOUT or _scales(node)):
        data = node.inputs[0]
        if data is None or data not in alone or data.dtype != ir.DataType.FLOAT:
            break
        current = data
        result = current if known_sizes(current, sources) is not None else result
    return result


def _scales(node: ir.Node) -> bool:
    factor = node.inputs[1] if node.op_type == "Mul" else None
    return factor is not None and factor.const_value is not None and factor.const_value.size == 1


def known_sizes(value: ir.Value, sources: Sequence[ir.Value]) -> Sizes | None:
    """Return the sizes after the first dimension, if there are any and all satisfy rule 4."""
    given = {str(dim) for source in sources for dim in (source.shape or ())[1:] if not isinstance(dim, int)}
    sizes = tuple(dim if isinstance(dim, int) else str(dim) for dim in (value.shape or ())[1:])
    return sizes if sizes and all(isinstance(size, int) or size in given for size in sizes) else None


def count_rows_of(graph: ir.Graph, sources: Sequence[ir.Value], counted: ir.Value) -> None:
    """Rule 2: let nodes read the number of rows from ``counted``; if it is not a source, only nodes of sources."""
    for node in graph:
        if _counts_rows(node, sources) and (counted in sources or node.inputs[0] in sources):
            node.replace_input_with(0, counted)
