"""Pass ``half_precision``: weights and arithmetic in fp16 or bf16, with islands (operators kept in fp32).

Strongly typed engines read the precision from the graph: every tensor has the type in which it is computed, and there
is a Cast at each border of an island.

Rules of the rewrite:

1. Every node that computes a float tensor computes it in half precision, unless it is an island.
2. Nodes that read float tensors but compute none, such as comparisons, read fp32.
3. The scales of Resize, and scale and bias of ONNX Runtime's GroupNorm, stay fp32, because the operators take no other
   type.
4. A Cast follows its producer directly, and each tensor is cast at most once to each type. Weights are converted, not
   cast.
5. Inputs and outputs of the graph keep name and type, so that every engine and precision takes the same arrays; those
   named in ``half_values`` become half.
6. The model imports the first opset in which every operator here accepts the type: 20 for fp16, 22 for bf16.

Rules of the islands (``graph.islands.find_islands``); the first that applies is reported as the reason:

1. "sizes": float values computed from integers, such as shapes and positions, up to the first matrix product or table
   lookup, and the generators ConstantOfShape and Range. Half precision would round large integers (fp16 above 2048).
2. "timestep embedding": the same for values computed from the graph's integer inputs and from its timestep, which can
   be float32; that is the sines and cosines of the timestep.
3. "softmax": Softmax and LogSoftmax.
4. "statistics": normalization operators, means, Pow and Sqrt, and of a decomposed normalization every operator from the
   first mean to the division by the root of the variance. Operators in ``fp32_inside`` are left out.
5. "selection": every operator that an ArgMin, ArgMax or TopK depends on, e.g. the distances to the codes of quantized
   latents. A rounded distance would select another code.
6. "range", too large: the operator reads or writes a tensor whose largest measured magnitude, times 4, exceeds the
   largest number of the type (65504 for fp16). The factor 4 allows for prompts that were not measured.
7. "range", too small: the operator writes a tensor whose largest measured magnitude is not zero but below the smallest
   normal number of the type (2^-14 for fp16, 2^-126 for bf16), where half precision has fewer significant bits. For
   matrix products, convolutions, Mul and Div this also applies to the first two inputs, which are multiplied.

Precondition: every float tensor that the graph computes was measured.
Postcondition: every value has the type in which its node computes it; ``onnx.checker`` accepts the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ldm_export.graph.islands import MATRIX, computes, find_islands
from ldm_export.graph.nodes import range_names
from ldm_export.graph.passes.result import PassResult
from ldm_runtime.errors import BuildError

__all__ = ["DTYPES", "OPSETS", "HalfResult", "half_precision"]

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
OPSETS = {"fp16": 20, "bf16": 22}
"""Precision -> the first opset in which every operator of an exported graph accepts the type."""
_FLOAT = ir.DataType.FLOAT
_FLOAT_ONLY = {"Resize": (1, 2), "GroupNorm": (1, 2), "SkipGroupNorm": (1, 2)}
"""Operator -> indices of inputs that are always fp32, whatever the type of the data is."""


@dataclass(frozen=True)
class HalfResult(PassResult):
    """Result of ``half_precision``; ``changes`` is the number of nodes that compute in half precision.

    Attributes:
        islands: Node name -> reason why it stays in fp32.
        matrix_islands: Names of the islands that are convolutions or matrix products, in the graph's order.
    """

    islands: Mapping[str, str]
    matrix_islands: tuple[str, ...]


def half_precision(
    precision: str,
    ranges: Mapping[str, float],
    *,
    fp32_inside: Collection[str] = (),
    half_values: Collection[str] = (),
) -> Callable[[ir.Model], HalfResult]:
    """Create the pass that converts an fp32 graph to half precision.

    Args:
        precision: "fp16" or "bf16".
        ranges: Tensor name -> largest measured magnitude, of every float tensor that the graph computes
            (``graph.ranges.measure_ranges``). Magnitudes of the graph's inputs are used where they are known.
        fp32_inside: Normalization operators that the engine computes in fp32 internally.
        half_values: Names of inputs and outputs of the graph that become half precision.

    Returns:
        A pass that rewrites its model in place. It raises BuildError if a computed tensor was not measured.

    Raises:
        BuildError: The precision is unknown.
    """
    if precision not in DTYPES:
        raise BuildError(f"pass half_precision: got precision {precision!r}, expected one of {', '.join(DTYPES)}")

    def convert(model: ir.Model) -> HalfResult:
        return _convert(model, precision, ranges, fp32_inside, half_values)

    convert.__name__ = f"half_precision({precision})"
    return convert


def _convert(
    model: ir.Model,
    precision: str,
    ranges: Mapping[str, float],
    fp32_inside: Collection[str],
    half_values: Collection[str],
) -> HalfResult:
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    graph, half = model.graph, DTYPES[precision]
    _check_measured(graph, ranges)
    islands = find_islands(graph, precision, ranges, fp32_inside)
    for graph_input in graph.inputs:
        if graph_input.name in half_values and graph_input.dtype == _FLOAT:
            graph_input.type = ir.TensorType(half)
    computing = [node for node in graph if computes(node)]
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    reading = [node for node in graph if node not in computing and node.op_type not in ("Shape", "Size")]
    for node in (*computing, *reading):
        compute_type = half if node in computing and node.name not in islands else _FLOAT
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FLOAT, half):
                continue
            dtype = _FLOAT if index in _FLOAT_ONLY.get(node.op_type, ()) else compute_type
            if value.dtype != dtype:
                node.replace_input_with(index, _as(graph, value, dtype, casts))
        if compute_type == half:
            _compute_in(node, half)
    for index, value in enumerate(graph.outputs):
        if value.dtype == half and value.name not in half_values:
            _restore(graph, index, value)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    model.opset_imports[""] = max(model.opset_imports[""], OPSETS[precision])
    matrix = tuple(node.name or "" for node in computing if node.op_type in MATRIX and node.name in islands)
    return HalfResult(model, len(computing) - len(islands), islands, matrix)


def _check_measured(graph: ir.Graph, ranges: Mapping[str, float]) -> None:
    inputs = {value.name for value in graph.inputs}
    missing = [
        name
        for node in graph
        for value in node.outputs
        if value.dtype == _FLOAT
        for name in range_names(value)
        if name not in ranges and name not in inputs
    ]
    if missing:
        raise BuildError(
            f"{graph.name}: pass half_precision: {len(missing)} tensors were not measured, first {missing[0]!r}, "
            "expected a magnitude for every computed tensor; measure the ranges of this graph again"
        )


def _as(
    graph: ir.Graph, value: ir.Value, dtype: ir.DataType, casts: dict[tuple[ir.Value, ir.DataType], ir.Value]
) -> ir.Value:
    """Return a value in another type: a converted weight, or a Cast directly after the value's producer."""
    if (value, dtype) in casts:
        return casts[value, dtype]
    name = f"{value.name}/{dtype.name.lower()}"
    if value.is_initializer():
        assert value.const_value is not None
        converted = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        converted.const_value = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
        graph.initializers[name] = converted
    else:
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/Cast")
        converted = cast.outputs[0]
        converted.name, converted.shape, converted.type = name, value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], cast)
        else:
            graph.insert_after(producer, cast)
    casts[value, dtype] = converted
    return converted


def _compute_in(node: ir.Node, half: ir.DataType) -> None:
    """Set the type of a node's float results to half."""
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", int(half))
    for value in node.outputs:
        if value.dtype == _FLOAT:
            value.type = ir.TensorType(half)


def _restore(graph: ir.Graph, index: int, value: ir.Value) -> None:
    """Cast an output of the graph back to fp32. The result of the Cast gets its name."""
    name, producer = value.name, value.producer()
    assert producer is not None
    cast = ir.node("Cast", [value], {"to": int(_FLOAT)}, name=f"{name}/Cast")
    value.name = f"{name}/half"
    out = cast.outputs[0]
    out.name, out.shape, out.type = name, value.shape, ir.TensorType(_FLOAT)
    graph.insert_after(producer, cast)
    graph.outputs[index] = out
