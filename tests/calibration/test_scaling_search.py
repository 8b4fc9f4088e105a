"""Scalings that are compared on requests other than the observed ones: less error on further images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from ldm_calibration.graph_files import load_graph
from ldm_calibration.observation import observe
from ldm_calibration.qdq import QuantizedTensors, insert_qdq
from ldm_calibration.scaling_search import RESULT_HEADROOM, search_scalings
from ldm_calibration.sessions import Session
from ldm_calibration.trajectories import Feed

CHANNELS = 16


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = relu(x) convolved with 1×1 weights and doubled."""
    weights = np.random.default_rng(0).standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"], name="relu"),
        helper.make_node("Conv", ["positive", "w"], ["convolved"], name="conv"),
        helper.make_node("Add", ["convolved", "convolved"], ["y"], name="add"),
    ]
    shape = ["rows", CHANNELS, 4, 4]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy")
    whole = helper.make_graph(nodes, "small", [x], [y], [numpy_helper.from_array(weights, "w")])
    model = onnx.shape_inference.infer_shapes(helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)]))
    model.ir_version = 10
    onnx.save(model, tmp_path / "fp32.onnx")
    return tmp_path / "fp32.onnx"


def feeds(seed: int, count: int = 4, size: float = 1.0) -> list[Feed]:
    """Feeds whose channels have heavy tails that differ from request to request."""
    rng = np.random.default_rng(seed)
    return [
        {"x": (size * rng.laplace(size=(2, CHANNELS, 4, 4)) * rng.uniform(1, 2)).astype(np.float32)}
        for _ in range(count)
    ]


def error(graph: Path, tensors: QuantizedTensors, inputs: Sequence[Feed]) -> float:
    model = load_graph(graph)
    insert_qdq(model, tensors, ["conv"])
    exact, int8 = Session(ir.load(graph), graph.parent), Session(model, graph.parent)
    return float(sum(np.square(int8.run(feed)["y"] - exact.run(feed)["y"]).sum() for feed in inputs))


def test_scalings_compared_on_other_requests_have_less_error_on_further_ones(graph: Path) -> None:
    observed, held_out, further = feeds(1), feeds(2, size=2.0), feeds(3, size=2.0)
    observations = observe(graph, observed)
    alike, other = (search_scalings(graph, observations, chosen) for chosen in (observed, held_out))
    assert other.sources["positive"].observer == "headroom"
    results = {"convolved": replace(other.results["convolved"], threshold=4 * other.results["convolved"].threshold)}
    errors = [
        error(graph, QuantizedTensors(found.tensors.sources, results), further) for found in (alike, other)
    ]  # results that are not clipped: the error is that of the input
    assert errors[1] < 0.8 * errors[0]


def test_results_that_grow_in_other_images_are_not_clipped(graph: Path) -> None:
    tensors = search_scalings(graph, observe(graph, feeds(1)), feeds(2)).tensors
    assert RESULT_HEADROOM > 1
    tight = {
        name: replace(scaling, threshold=scaling.threshold / RESULT_HEADROOM)
        for name, scaling in tensors.results.items()
    }
    larger = [{"x": RESULT_HEADROOM * feed["x"]} for feed in feeds(1)]
    roomy = {name: replace(scaling, threshold=4 * scaling.threshold) for name, scaling in tensors.sources.items()}
    assert error(graph, QuantizedTensors(roomy, tensors.results), larger) < error(
        graph, QuantizedTensors(roomy, tight), larger
    )
