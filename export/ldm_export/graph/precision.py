"""Half-precision graphs: weights and arithmetic in fp16 or bf16, with fp32 islands where half would overflow or lose.

Precision lives in the graph, as strongly typed engines want it: every tensor has the type it is computed in, and casts
stand where an island begins and ends. Inputs and outputs stay as they are, so every backend takes the same feed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ldm_export.graph.islands import MATRIX, computes, find_islands
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_runtime.errors import BuildError

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
OPSETS = {"fp16": 20, "bf16": 22}
"""The first opsets in which every operator here takes the type."""
_FLOAT = ir.DataType.FLOAT
_FLOAT_ONLY = {"Resize": (1, 2)}  # inputs that the standard wants in fp32 whatever the data's type


@dataclass(frozen=True)
class HalfGraph:
    """What became of a graph.

    Attributes:
        files: what was written.
        half: nodes that compute in half precision.
        islands: node → why it stays in fp32.
        matrix_islands: those of ``islands`` that are convolutions or matrix products.
    """

    files: tuple[Path, ...]
    half: int
    islands: Mapping[str, str]
    matrix_islands: tuple[str, ...]


def half_graph(source: Path, target: Path, precision: str, ranges: Mapping[str, float]) -> HalfGraph:
    """Rewrite an fp32 graph in half precision.

    Args:
        source: an fp32 graph of ``export_graph``; it stays as it is.
        target: path to write, with ``.data`` beside it beyond 1 MB of weights; its folder exists.
        precision: "fp16" or "bf16".
        ranges: tensor name → largest magnitude seen, of ``ranges.measure_ranges``.

    Raises:
        BuildError: a tensor that is computed was not measured, or the graph cannot be rewritten.
    """
    model = load_graph(source)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    graph, half = model.graph, DTYPES[precision]
    _check_measured(graph, ranges)
    islands = find_islands(graph, precision, ranges)
    computing = [node for node in graph if computes(node)]
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    reading = [node for node in graph if node not in computing and node.op_type not in ("Shape", "Size")]
    for node in (*computing, *reading):  # comparisons and the like decide on fp32 values
        wanted = half if node in computing and node.name not in islands else _FLOAT
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FLOAT, half):
                continue
            dtype = _FLOAT if index in _FLOAT_ONLY.get(node.op_type, ()) else wanted
            if value.dtype != dtype:
                node.replace_input_with(index, _as(graph, value, dtype, casts))
        if wanted == half:
            _compute_in(node, half)
    for index, value in enumerate(graph.outputs):
        if value.dtype == half:
            _restore(graph, index, value)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    model.opset_imports[""] = max(model.opset_imports[""], OPSETS[precision])
    files = save_graph(model, target)
    matrix = tuple(node.name or "" for node in computing if node.op_type in MATRIX and node.name in islands)
    return HalfGraph(tuple(files), len(computing) - len(islands), islands, matrix)


def _check_measured(graph: ir.Graph, ranges: Mapping[str, float]) -> None:
    missing = [
        value.name for node in graph for value in node.outputs if value.dtype == _FLOAT and value.name not in ranges
    ]
    if missing:
        raise BuildError(f"{graph.name}: {len(missing)} tensors were not measured, first {missing[0]!r}; report this")


def _as(
    graph: ir.Graph, value: ir.Value, dtype: ir.DataType, casts: dict[tuple[ir.Value, ir.DataType], ir.Value]
) -> ir.Value:
    """The same value in another type: a weight of that type, or one cast right behind its producer."""
    if (value, dtype) in casts:
        return casts[value, dtype]
    name = f"{value.name}/{dtype.name.lower()}"
    if value.is_initializer():
        assert value.const_value is not None
        made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        made.const_value = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
        graph.initializers[name] = made
    else:
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/Cast")
        made = cast.outputs[0]
        made.name, made.shape, made.type = name, value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], cast)
        else:
            graph.insert_after(producer, cast)
    casts[value, dtype] = made
    return made


def _compute_in(node: ir.Node, half: ir.DataType) -> None:
    """Have a node give half results where it gave fp32 ones."""
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(half))
    for value in node.outputs:
        if value.dtype == _FLOAT:
            value.type = ir.TensorType(half)


def _restore(graph: ir.Graph, index: int, value: ir.Value) -> None:
    """Give a graph's output back in fp32 under its own name."""
    name, producer = value.name, value.producer()
    assert producer is not None
    cast = ir.node("Cast", [value], {"to": int(_FLOAT)}, name=f"{name}/Cast")
    value.name = f"{name}/half"
    out = cast.outputs[0]
    out.name, out.shape, out.type = name, value.shape, ir.TensorType(_FLOAT)
    graph.insert_after(producer, cast)
    graph.outputs[index] = out
