"""Separates the bias from a layer, so that a later fused operator can add it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np
import onnx_ir as ir

from ldm_export.graph.nodes import CONTRIB, constant, producer, transformed

__all__ = ["is_vector", "sum_of_biases", "without_bias"]


def without_bias(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Return the value before its bias is added, and the bias [C]; the value itself and None if there is no such bias.

    The bias of an Add after a MatMul, or of a NhwcConv, is separated if a single node reads the sum. The bias of a
    NhwcConv is removed immediately, so the caller must add it.
    """
    if value.is_graph_output() or len(list(value.uses())) != 1:
        return value, None
    if (convolution := producer(value, "NhwcConv", domain=CONTRIB)) is not None:
        bias = convolution.inputs[2] if len(convolution.inputs) > 2 else None
        if bias is not None:
            convolution.replace_input_with(2, None)
            convolution.resize_inputs(2)
        return value, bias
    if (add := producer(value, "Add")) is not None:
        for product, bias in (add.inputs, tuple(reversed(add.inputs))):
            if producer(product, "MatMul") is not None and product is not None and is_vector(bias):
                return product, bias
    return value, None


def is_vector(value: ir.Value | None) -> bool:
    """True if a value is a constant [C]."""
    array = constant(value)
    return array is not None and array.ndim == 1


def sum_of_biases(graph: ir.Graph, name: str, biases: Sequence[ir.Value]) -> ir.Value | None:
    """Return the sum of constant biases [C] as one initializer; None if there are none."""
    if len(biases) < 2:
        return biases[0] if biases else None
    first = constant(biases[0])
    assert first is not None
    shape = first.shape
    return transformed(graph, f"{name}/bias", biases, lambda *arrays: reduce(np.add, arrays), shape)
