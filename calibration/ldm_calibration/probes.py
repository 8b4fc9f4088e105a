"""Probes: additional outputs of a graph that report its intermediate tensors.

Every function changes its model in place and does not change the values of existing outputs. Tensors are named by the
node outputs of the graph; inputs of the graph cannot be probed.

- ``add_extremes``: the maximum and the minimum of each tensor, two vectors.
- ``add_largest``: the largest magnitude of each tensor, one vector.
- ``add_outputs``: the tensors themselves.
- ``add_shapes``: the shape of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from ldm_runtime.errors import BuildError

__all__ = ["HIGHEST", "LARGEST", "LOWEST", "add_extremes", "add_largest", "add_outputs", "add_shapes"]

HIGHEST, LOWEST = "range/highest", "range/lowest"
"""Outputs of ``add_extremes``."""
LARGEST = "calibration/largest"
"""Output of ``add_largest``."""


def add_extremes(model: ir.Model, tensors: Sequence[str] | None = None) -> list[str]:
    """Add the outputs ``HIGHEST`` and ``LOWEST``: maximum and minimum of each tensor, float32 [number of tensors].

    The reductions come directly after the node that computes the tensor. An engine that keeps the graph's order (ONNX
    Runtime: ``ExecutionOrder.PRIORITY_BASED``) therefore frees each tensor as early as without the probe.

    Args:
        model: Model with typed values.
        tensors: Names of float32 tensors; None means every float32 tensor that the graph computes.

    Returns:
        The names of the tensors in the order of the two vectors.

    Raises:
        BuildError: There is no tensor to measure, or the graph does not compute one of the tensors.
    """
    if tensors is None:
        values = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    else:
        values = _values(model, tensors)
    _check_any(model, values)
    one = _one(model, "range/one")
    for name, kind in ((HIGHEST, "ReduceMax"), (LOWEST, "ReduceMin")):
        numbers = []
        for value in values:
            reduced = ir.node(kind, [value], {"keepdims": 0}, name=f"range/{kind}/{value.name}")
            vector = ir.node("Reshape", [reduced.outputs[0], one], name=f"range/{kind}/Reshape/{value.name}")
            producer = value.producer()
            assert producer is not None
            model.graph.insert_after(producer, [reduced, vector])
            numbers.append(vector.outputs[0])
        _join(model, numbers, name)
    return [value.name or "" for value in values]


def add_largest(model: ir.Model, names: Sequence[str]) -> tuple[str, ...]:
    """Add the output ``LARGEST``: the largest magnitude of each tensor, float32 [number of tensors].

    Args:
        model: Model with typed values.
        names: Names of float32 tensors. Inputs of the graph are skipped, and repeated names count once.

    Returns:
        The names of the tensors in the order of the vector.

    Raises:
        BuildError: There is no tensor to measure, or the graph does not compute one of the tensors.
    """
    inputs = {value.name for value in model.graph.inputs}
    values = _values(model, [name for name in dict.fromkeys(names) if name not in inputs])
    _check_any(model, values)
    one = _one(model, "calibration/one")
    numbers = []
    for value in values:
        magnitudes = ir.node("Abs", [value], name=f"{value.name}/abs")
        reduced = ir.node("ReduceMax", [magnitudes.outputs[0]], {"keepdims": 0}, name=f"{value.name}/largest")
        vector = ir.node("Reshape", [reduced.outputs[0], one], name=f"{value.name}/vector")
        model.graph.extend([magnitudes, reduced, vector])
        numbers.append(vector.outputs[0])
    _join(model, numbers, LARGEST)
    return tuple(value.name or "" for value in values)


def add_outputs(model: ir.Model, names: Sequence[str]) -> tuple[str, ...]:
    """Make tensors outputs of the graph, in the order of ``names``.

    Args:
        model: Any model.
        names: Names of tensors. A tensor that is already an output keeps its position.

    Returns:
        The names of the added outputs.

    Raises:
        BuildError: The graph does not compute one of the tensors.
    """
    present = {value.name for value in model.graph.outputs}
    values = _values(model, [name for name in dict.fromkeys(names) if name not in present])
    model.graph.outputs.extend(values)
    return tuple(value.name or "" for value in values)


def add_shapes(model: ir.Model, names: Sequence[str]) -> dict[str, str]:
    """Add one output for the shape of each tensor, int64 [rank].

    Args:
        model: Any model.
        names: Names of tensors; repeated names count once.

    Returns:
        Name of the output -> name of the tensor.

    Raises:
        BuildError: The graph does not compute one of the tensors.
    """
    added = {}
    for value in _values(model, list(dict.fromkeys(names))):
        node = ir.node("Shape", [value], name=f"{value.name}/shape")
        output = node.outputs[0]
        output.name, output.type = f"{value.name}/shape", ir.TensorType(ir.DataType.INT64)
        output.shape = None if value.shape is None else ir.Shape([len(value.shape)])
        model.graph.append(node)
        model.graph.outputs.append(output)
        added[output.name] = value.name or ""
    return added


def _values(model: ir.Model, names: Sequence[str]) -> list[ir.Value]:
    computed = {value.name: value for node in model.graph for value in node.outputs}
    if missing := [name for name in names if name not in computed]:
        raise BuildError(
            f"{model.graph.name}: got tensor {missing[0]!r}, expected one that a node of the graph computes; "
            "take the names from the same graph"
        )
    return [computed[name] for name in names]


def _check_any(model: ir.Model, values: Sequence[ir.Value]) -> None:
    if not values:
        raise BuildError(f"{model.graph.name}: got no tensor to measure, expected at least one; choose other tensors")


def _one(model: ir.Model, name: str) -> ir.Value:
    """Return the shape [1] as an initializer."""
    one = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    one.const_value = ir.tensor([1], dtype=ir.DataType.INT64, name=name)
    model.graph.initializers[name] = one
    return one


def _join(model: ir.Model, numbers: Sequence[ir.Value], name: str) -> None:
    """Concatenate vectors with one number each to an output ``name``."""
    joined = ir.node("Concat", numbers, {"axis": 0}, name=name)
    output = joined.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(numbers)])
    model.graph.append(joined)
    model.graph.outputs.append(output)
