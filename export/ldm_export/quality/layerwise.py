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

__all__ = ["LayerDifference", "compare_layers", "first_beyond"]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class LayerDifference:
    """Comparison of one tensor that both graphs compute.

    Attributes:
        tensor, node: Names of the tensor and of the node that computes it.
        dtype: Its type in the examined graph.
        error: Largest |difference| divided by ``largest``; infinite if a value is not finite.
        largest: Largest |value| in the reference graph.
    """

    tensor: str
    node: str
    dtype: str
    error: float
    largest: float


def compare_layers(graph: Path, against: Path, feed: Mapping[str, NDArray[Any]]) -> list[LayerDifference]:
    """Compare every float tensor that both graphs compute, on the CPU, in the order of the graph.

    All tensors of a call are in memory twice, so use inputs with one row.

    Args:
        graph: The graph to examine.
        against: The fp32 graph from which it was made.
        feed: Inputs of the component.

    Raises:
        BuildError: ONNX Runtime cannot run a graph, or the two share no tensor.
    """
    both = _tensors(graph).keys() & _tensors(against).keys()
    got = _values(graph, both, feed)
    expected = _values(against, both, feed)
    layers = []
    for name, (node, dtype) in _tensors(graph).items():
        if name in both:
            one, other = got.pop(name), expected.pop(name)
            layers.append(LayerDifference(name, node, dtype, *_difference(one, other)))
    if not layers:
        raise BuildError(f"{graph}: shares no tensor with {against}; compare graphs of one component")
    return layers


def first_beyond(layers: list[LayerDifference], threshold: float) -> LayerDifference | None:
    """Return the first tensor whose error exceeds the threshold, or None."""
    return next((layer for layer in layers if not layer.error <= threshold), None)


def _difference(one: NDArray[Any], other: NDArray[Any]) -> tuple[float, float]:
    got, expected = one.astype(np.float32), other.astype(np.float32)
    largest = float(np.abs(expected).max()) if expected.size else 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.abs(got - expected).max()) if expected.size else 0.0
    return (error / (largest or 1.0) if np.isfinite(error) else float("inf")), largest


def _tensors(graph: Path) -> dict[str, tuple[str, str]]:
    """Float tensor -> name of the node that computes it, and its type."""
    return {
        value.name or "": (node.name or "", value.dtype.name.lower())
        for node in ir.load(graph).graph
        for value in node.outputs
        if value.dtype in FLOATS
    }


def _values(graph: Path, names: set[str], feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run a copy of the graph that has these tensors as outputs; weights are referenced, not copied."""
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
    except Exception as error:  # onnxruntime raises classes without a common base
        raise BuildError(f"{graph}: onnxruntime cannot run it on the CPU: {first_line(error)}") from None
    finally:
        probe.unlink(missing_ok=True)
