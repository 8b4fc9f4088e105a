"""Compares two precisions of a graph tensor by tensor, and finds the first tensor that differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ldm_calibration.probes import add_outputs
from ldm_runtime.backends.host import first_line
from ldm_runtime.backends.onnxruntime_session import load_onnxruntime
from ldm_runtime.errors import BuildError

__all__ = ["Layer", "compare_layers", "first_beyond"]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Layer:
    """A tensor of both graphs.

    Attributes:
        tensor, node: its name and that of the node that gives it.
        dtype: its type in the graph that is looked at.
        error: largest |difference|, as a share of the largest |value|; infinite where it is not finite.
        largest: largest |value| in the graph it is compared with.
    """

    tensor: str
    node: str
    dtype: str
    error: float
    largest: float


def compare_layers(graph: Path, against: Path, feed: Mapping[str, NDArray[Any]]) -> list[Layer]:
    """Every float tensor that both graphs compute, in the order of the graph, on the CPU.

    All tensors of one call are held twice, in two types: give a feed of one row.

    Args:
        graph: the one that is looked at.
        against: the one it was made of, in fp32.

    Raises:
        BuildError: ONNX Runtime cannot run a graph, or the two share no tensor.
    """
    both = _tensors(graph).keys() & _tensors(against).keys()
    found = _values(graph, both, feed)
    expected = _values(against, both, feed)
    layers = []
    for name, (node, dtype) in _tensors(graph).items():
        if name in both:
            one, other = found.pop(name), expected.pop(name)
            layers.append(Layer(name, node, dtype, *_difference(one, other)))
    if not layers:
        raise BuildError(f"{graph}: shares no tensor with {against}; compare graphs of one component")
    return layers


def first_beyond(layers: list[Layer], threshold: float) -> Layer | None:
    """The first tensor whose error passes the threshold; None where none does."""
    return next((layer for layer in layers if not layer.error <= threshold), None)


def _difference(one: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    got, wanted = one.astype(np.float32), other.astype(np.float32)
    largest = float(np.abs(wanted).max()) if wanted.size else 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.abs(got - wanted).max()) if wanted.size else 0.0
    return (error / (largest or 1.0) if np.isfinite(error) else float("inf")), largest


def _tensors(graph: Path) -> dict[str, tuple[str, str]]:
    """Float tensor → the node that gives it and its type. A graph's outputs count under their own names."""
    return {
        value.name or "": (node.name or "", value.dtype.name.lower())
        for node in ir.load(graph).graph
        for value in node.outputs
        if value.dtype in FLOATS
    }


def _values(graph: Path, names: set[str], feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run a copy of the graph, weights referred to, that gives these tensors out."""
    model = ir.load(graph)
    add_outputs(model, sorted(names))
    probe = graph.with_name(f".{graph.stem}.layers.onnx")
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        ir.save(model, probe)
        session = onnxruntime.InferenceSession(str(probe), options, providers=["CPUExecutionProvider"])
        order = sorted(names)
        return dict(zip(order, session.run(order, dict(feed)), strict=True))
    except Exception as error:  # onnxruntime raises bare classes of its C++ side
        raise BuildError(f"{graph}: onnxruntime cannot run it on the CPU: {first_line(error)}") from None
    finally:
        probe.unlink(missing_ok=True)
