"""Splits a traced graph into components by how often they run, and reads the specs of components from their graphs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from ldm_export.graph.passes.split_off import (
    Split,
    split_added_embedding,
    split_cross_attention_kv,
    split_time_embedding,
)
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import Axis, ComponentSpec, Dim, TensorSpec

__all__ = ["ADDED_EMBEDDING", "CROSS_ATTENTION_KV", "TIME_EMBEDDING", "SplitRule", "graph_spec", "split_component"]

_DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.UINT8: "uint8",
}
_SYMBOL = re.compile(r"(?:(\d+)\*)?([a-z_]+)")


@dataclass(frozen=True)
class SplitRule:
    """A part of a traced graph that becomes a separate component.

    Attributes:
        component: Name of the component that the part becomes.
        runs: How often it runs, one of ``specs.RUNS``.
        split: Splits a model; returns None if there is nothing to split off.
    """

    component: str
    runs: str
    split: Callable[[ir.Model], Split | None]


CROSS_ATTENTION_KV = SplitRule("cross_attention_kv", "request", split_cross_attention_kv)
"""Keys and values of cross-attention, which are constant over the steps of a request."""
ADDED_EMBEDDING = SplitRule("added_embedding", "request", split_added_embedding)
"""Embedding of pooled texts and sizes, which are constant over the steps of a request."""
TIME_EMBEDDING = SplitRule("time_embedding", "schedule", split_time_embedding)
"""Projected timestep embeddings, which depend only on the schedule."""


def split_component(model: ir.Model, rules: Sequence[SplitRule]) -> dict[str, ir.Model]:
    """Return component -> graph: the parts in the order of the rules, then the rest under the model's own name.

    Parts that the model does not have are left out.

    Raises:
        BuildError: The model cannot be split; see ``passes.split_off``.
    """
    parts: dict[str, ir.Model] = {}
    for rule in rules:
        split = rule.split(model)
        if split is not None:
            parts[rule.component], model = split.prefix, split.rest
    return {**parts, model.graph.name or "": model}


def graph_spec(graph: Path, name: str, runs: str, axes: Mapping[str, Axis]) -> ComponentSpec:
    """Read the spec of a component from its graph.

    Args:
        graph: Path of the graph; weights are not read.
        name: Name of the component.
        runs: How often it runs.
        axes: Axis name -> bounds, for every dimension that is not fixed.

    Raises:
        BuildError: A dimension or a dtype is unknown.
    """
    model = ir.load(graph)
    sides = (model.graph.inputs, model.graph.outputs)
    inputs, outputs = (tuple(_tensor(name, value, axes) for value in side) for side in sides)
    return ComponentSpec(name, inputs, outputs, runs)


def _tensor(component: str, value: ir.Value, axes: Mapping[str, Axis]) -> TensorSpec:
    if value.dtype not in _DTYPES or value.shape is None:
        raise BuildError(f"{component}: {value.name}: got {value.dtype} {value.shape}, expected a known dtype and rank")
    shape = tuple(_dim(component, value, dim, axes) for dim in value.shape)
    return TensorSpec(value.name or "", _DTYPES[value.dtype], shape)


def _dim(component: str, value: ir.Value, dim: int | ir.SymbolicDim, axes: Mapping[str, Axis]) -> Dim:
    if isinstance(dim, int):
        return dim
    match = _SYMBOL.fullmatch(str(dim.value))
    if match is None or match[2] not in axes:
        raise BuildError(f"{component}: {value.name}: got dimension {dim}, expected a size or one of {', '.join(axes)}")
    axis = axes[match[2]]
    return Axis(axis.name, axis.min, axis.opt, axis.max, int(match[1] or 1))
