"""Splits a graph in two: the part that depends only on certain inputs, and the rest.

Values that depend only on the contexts are constant over the steps of a prompt, and values that depend only on the
timestep are constant over requests. As separate components they are computed once instead of at every UNet call.

Rules:

1. The cut consists of the float tensors that depend only on the inputs ``sources`` and that other nodes need
   (``passes.frontier``, rules 1 to 4).
2. A tensor at the cut is float32 with a dynamic first dimension. Its other dimensions are fixed or, without ``pack``,
   those of a source.
3. Without ``pack`` the tensors are outputs of the prefix and inputs of the rest, in the graph's order. With ``pack``
   the prefix flattens each to [batch, C_i] and concatenates them on axis 1; the rest takes the one tensor [batch, S]
   and divides it by a Split with constant sizes. It reshapes parts of a higher rank to [batch, ...].
4. The new inputs take the position of the first source. Nodes keep their names, tensors after a Split theirs, and
   dimensions their symbols. Each part has the weights that it uses.

Preconditions: values have types and shapes, names are unique, no tensor has the name of a new one.
Postcondition: no node and no output of the rest depends on a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ldm_export.graph.passes.frontier import Sizes, count_rows_of, depend_on, frontier, known_sizes
from ldm_runtime.errors import BuildError

__all__ = [
    "Split",
    "TensorFacts",
    "split_added_embedding",
    "split_cross_attention_kv",
    "split_off",
    "split_time_embedding",
]

CONTEXTS = ("context", "context_2")
"""Hidden states of a model's text encoders."""


@dataclass(frozen=True)
class TensorFacts:
    """A tensor that the prefix computes and the rest reads.

    Attributes:
        name: Its name as output of the prefix and input of the rest.
        dtype: Always "float32".
        shape: Sizes, and symbols of open dimensions.
        parts: Names in the whole graph of the tensors of which it consists: one, or with ``pack`` all of them in order.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """The two parts of a graph. ``rest``, applied to the outputs of ``prefix``, computes the graph's results.

    Attributes:
        prefix: Graph from the sources to ``values``.
        rest: Graph that takes ``values`` in place of the sources.
        values: The tensors between them, in the order of the prefix's outputs.
    """

    prefix: ir.Model
    rest: ir.Model
    values: tuple[TensorFacts, ...]


def split_cross_attention_kv(model: ir.Model) -> Split | None:
    """Split off the keys and values of every cross-attention.

    The prefix ``cross_attention_kv`` takes those of ``CONTEXTS`` that the model has, float32 [batch, T, D], and returns
    ``kv.0``, ``kv.1``, ..., each float32 [batch, T, width]. Returns None and raises errors as ``split_off`` does.
    """
    return split_off(model, CONTEXTS, "cross_attention_kv", stem="kv")


def split_added_embedding(model: ir.Model) -> Split | None:
    """Split off the embedding of pooled texts and sizes, which is added to the timestep embedding.

    The prefix ``added_embedding`` takes ``text_embeds`` float32 [batch, P] and ``time_ids`` int64 [batch, 6] and
    returns ``added_embedding.0`` float32 [batch, W]. Returns None and raises errors as ``split_off`` does.
    """
    return split_off(model, ("text_embeds", "time_ids"), "added_embedding")


def split_time_embedding(model: ir.Model) -> Split | None:
    """Split off the time embedding and its projections for every residual block.

    The prefix ``time_embedding`` takes ``timestep`` int64 or float32 [batch] and returns one output ``time_embedding``
    float32 [batch, S]. Returns None and raises errors as ``split_off`` does.
    """
    return split_off(model, ("timestep",), "time_embedding", pack="time_embedding")


def split_off(
    model: ir.Model, sources: Sequence[str], name: str, pack: str | None = None, stem: str | None = None
) -> Split | None:
    """Split a graph at the float tensors that depend only on certain inputs.

    Args:
        model: Any model. It is not changed; the parts share the memory of its weights.
        sources: Names of the inputs; those that the model does not have are ignored.
        name: Graph name of the prefix.
        pack: Name of a single tensor [batch, S] that replaces all tensors of the cut.
        stem: Without ``pack``, the tensors are named "<stem>.0", "<stem>.1", ...; by default ``name``.

    Returns:
        The parts, or None if the graph has no such input or computes nothing only from them.

    Raises:
        BuildError: A tensor at the cut has another dynamic dimension than the first or is not float32, a new name is in
            use, or the rest still depends on a source.
    """
    inputs = _inputs(model, sources)
    values = frontier(model.graph, inputs) if inputs else []
    if not values:
        return None
    rows = inputs[0].shape[0] if inputs[0].shape else None
    shapes = [_sizes(model, value, inputs, pack is not None) for value in values]
    symbol = rows if isinstance(rows, int) else str(rows.value if rows is not None else None)
    parts = [value.name or "" for value in values]
    if pack is None:
        facts = tuple(
            TensorFacts(f"{stem or name}.{index}", "float32", (symbol, *sizes), (part,))
            for index, (sizes, part) in enumerate(zip(shapes, parts, strict=True))
        )
    else:
        facts = (TensorFacts(pack, "float32", (symbol, sum(map(_count, shapes))), tuple(parts)),)
    used_names = {value.name for value in model.graph.inputs} | {v.name for node in model.graph for v in node.outputs}
    if clash := [fact.name for fact in facts if fact.name in used_names - set(fact.parts)]:
        raise _error(model, f"got a graph with a tensor {clash[0]!r}, expected that name to be free; rename the tensor")
    prefix, rest = model.clone(), model.clone()
    prefix.graph.name = name
    _keep_prefix(prefix, _inputs(prefix, sources), facts, shapes, pack is not None)
    _keep_rest(rest, _inputs(rest, sources), facts, shapes, pack is not None)
    return Split(prefix, rest, facts)


def _sizes(model: ir.Model, value: ir.Value, sources: Sequence[ir.Value], packed: bool) -> Sizes:
    sizes = known_sizes(value, sources)
    if sizes is None or (packed and not all(isinstance(size, int) for size in sizes)):
        raise _error(
            model,
            f"got tensor {value.name!r} with shape {value.shape}, expected fixed sizes behind the first dimension; "
            "export the graph with fixed sizes, or do not split it",
        )
    return sizes


def _count(sizes: Sizes) -> int:
    """Number of values of a row with fixed sizes."""
    return prod(map(int, sizes))


def _keep_prefix(
    model: ir.Model, inputs: Sequence[ir.Value], facts: Sequence[TensorFacts], shapes: Sequence[Sizes], packed: bool
) -> None:
    graph = model.graph
    values = _values(graph, [part for fact in facts for part in fact.parts])
    count_rows_of(graph, inputs, inputs[0])
    if packed:
        (fact,) = facts
        flat = [_flatten(graph, value, sizes) for value, sizes in zip(values, shapes, strict=True)]
        node = ir.node("Concat", flat, {"axis": 1}, name=f"{fact.name}/Concat")
        graph.append(node)
        values = [node.outputs[0]]
    for value, fact in zip(values, facts, strict=True):
        value.name, value.type, value.shape = fact.name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(fact.shape)
    graph.outputs[:] = values
    RemoveUnusedNodesPass()(model)
    graph.inputs[:] = inputs


def _keep_rest(
    model: ir.Model, inputs: Sequence[ir.Value], facts: Sequence[TensorFacts], shapes: Sequence[Sizes], packed: bool
) -> None:
    graph = model.graph
    parts = [part for fact in facts for part in fact.parts]
    values = _values(graph, parts)
    new_inputs = [
        ir.Value(name=fact.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(fact.shape)) for fact in facts
    ]
    position = list(graph.inputs).index(inputs[0])
    graph.inputs[position:position] = new_inputs
    for value in values:
        value.name = f"{inputs[0].name}/{value.name}"
    replacements = _divide(graph, new_inputs[0], parts, shapes) if packed else new_inputs
    for value, replacement in zip(values, replacements, strict=True):
        value.replace_all_uses_with(replacement, replace_graph_outputs=True)
    others = [value for value in graph.inputs if value not in inputs]
    if other := next(
        (value for value in others if value.shape and inputs[0].shape and value.shape[0] == inputs[0].shape[0]), None
    ):
        count_rows_of(graph, inputs, other)
    RemoveUnusedNodesPass()(model)
    if dependent := depend_on(graph, inputs, alone=False) - set(inputs):
        name = next(node.name for node in graph if node.outputs[0] in dependent)
        names = " and ".join(repr(value.name) for value in inputs)
        raise _error(model, f"got node {name!r}, which needs {names} itself, expected only float tensors; do not split")
    for value in inputs:
        if value.is_graph_output():
            raise _error(model, f"got {value.name!r} as an output, expected computed tensors; do not split it")
        graph.inputs.remove(value)


def _flatten(graph: ir.Graph, value: ir.Value, sizes: Sizes) -> ir.Value:
    return value if len(sizes) == 1 else _reshaped(graph, value, (_count(sizes),), f"{value.name}/flat")


def _divide(graph: ir.Graph, packed: ir.Value, parts: Sequence[str], shapes: Sequence[Sizes]) -> list[ir.Value]:
    """Add nodes at the beginning of the graph that divide a packed tensor into its parts, each under its name."""
    widths = [_count(sizes) for sizes in shapes]
    table = _constant(graph, f"{packed.name}/sizes", widths)
    split = ir.node("Split", [packed, table], {"axis": 1}, num_outputs=len(parts), name=f"{packed.name}/Split")
    graph.insert_before(graph[0], split)
    assert packed.shape is not None
    divided = []
    for value, part, sizes in zip(split.outputs, parts, shapes, strict=True):
        value.name, value.type = part, ir.TensorType(ir.DataType.FLOAT)
        value.shape = ir.Shape([packed.shape[0], _count(sizes)])
        if len(sizes) > 1:
            value.name = f"{part}/flat"
            value = _reshaped(graph, value, tuple(map(int, sizes)), part)
        divided.append(value)
    return divided


def _reshaped(graph: ir.Graph, value: ir.Value, sizes: tuple[int, ...], name: str) -> ir.Value:
    """Reshape a value to [rows, *sizes]."""
    shape = _constant(graph, f"{name}/shape", [-1, *sizes])
    node = ir.node("Reshape", [value, shape], name=f"{name}/Reshape")
    producer = value.producer()
    assert producer is not None and value.shape is not None
    graph.insert_after(producer, node)
    result = node.outputs[0]
    result.name, result.type, result.shape = name, value.type, ir.Shape([value.shape[0], *sizes])
    return result


def _constant(graph: ir.Graph, name: str, numbers: Sequence[int]) -> ir.Value:
    array = np.array(numbers, np.int64)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64))
    value.const_value = ir.tensor(array, name=name)
    graph.initializers[name] = value
    return value


def _inputs(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    return [value for value in model.graph.inputs if value.name in names]


def _values(graph: ir.Graph, names: Sequence[str]) -> list[ir.Value]:
    computed = {value.name: value for node in graph for value in node.outputs}
    return [computed[name] for name in names]


def _error(model: ir.Model, problem: str) -> BuildError:
    return BuildError(f"{model.graph.name}: pass split_off: {problem}")
