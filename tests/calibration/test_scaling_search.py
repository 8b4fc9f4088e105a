"""Scalings: the smoothing with the least error on other requests than the observed ones, and no clipping."""

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
from ldm_calibration.qdq import QuantizedTensors, Scaling, insert_qdq
from ldm_calibration.scaling_search import EXPONENTS, HEADROOM, RESULT_HEADROOM, search_scalings
from ldm_calibration.sessions import Session
from ldm_calibration.trajectories import Feed
from ldm_calibration.weights import smoothing_factors

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


def feeds(seed: int, count: int = 4) -> list[Feed]:
    """Feeds with channels of different magnitudes, and heavy tails that differ from request to request."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(0.2, 5, CHANNELS)[:, None, None]
    return [
        {"x": (sizes * rng.laplace(size=(2, CHANNELS, 4, 4)) * rng.uniform(1, 2)).astype(np.float32)}
        for _ in range(count)
    ]


def error(graph: Path, tensors: QuantizedTensors, inputs: Sequence[Feed]) -> float:
    model = load_graph(graph)
    insert_qdq(model, tensors, ["conv"])
    exact, int8 = Session(ir.load(graph), graph.parent), Session(model, graph.parent)
    return float(sum(np.square(int8.run(feed)["y"] - exact.run(feed)["y"]).sum() for feed in inputs))


def test_the_chosen_smoothing_has_the_least_error_on_other_requests(graph: Path) -> None:
    observed, held_out = feeds(1), feeds(2)
    found = search_scalings(graph, observe(graph, observed), held_out)
    channels = np.max([feed["x"].max((0, 2, 3)) for feed in observed], axis=0)
    weights = np.abs(numpy_helper.to_array(onnx.load(graph).graph.initializer[0])).max((0, 2, 3))
    results = {"convolved": replace(found.results["convolved"], threshold=4 * found.results["convolved"].threshold)}
    errors = dict[float, float]()
    for exponent in EXPONENTS:
        factors = smoothing_factors(channels, weights, exponent)
        scaling = Scaling(HEADROOM * float((channels / factors).max()), factors)
        if exponent == found.sources["positive"].exponent:
            assert found.tensors.sources["positive"].threshold == pytest.approx(scaling.threshold)
        errors[exponent] = error(graph, QuantizedTensors({"positive": scaling}, results), held_out)
    assert errors[found.sources["positive"].exponent] == min(errors.values()) < errors[0.0]


def test_inputs_that_grow_in_other_images_are_not_clipped(graph: Path) -> None:
    tensors = search_scalings(graph, observe(graph, feeds(1)), feeds(2)).tensors
    results = {name: replace(scaling, threshold=4 * scaling.threshold) for name, scaling in tensors.results.items()}
    tight = {
        name: replace(scaling, threshold=scaling.threshold / HEADROOM) for name, scaling in tensors.sources.items()
    }
    larger = [{"x": HEADROOM * feed["x"]} for feed in feeds(1)]
    assert error(graph, QuantizedTensors(tensors.sources, results), larger) < error(
        graph, QuantizedTensors(tight, results), larger
    )


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
