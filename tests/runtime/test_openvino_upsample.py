"""Doubling and convolution as four convolutions: the same numbers, and only where it is that."""

from __future__ import annotations

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from ldm_runtime.backends.openvino_upsample import fold_upsampling

RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 5, 8, 9)).astype(np.float32)


def graph(factor: int = 2, mode: str = "nearest", kernel: int = 3, pad: int = 1, shared: bool = False, height: int = 8):
    """y = convolution(resize(relu(x))), with weights of one seed."""
    x = ops.parameter([2, 5, height, 9], np.float32)
    size = np.array([factor * height, factor * 9], np.int64)
    axes = np.array([2, 3], np.int64)
    large = ops.interpolate(
        ops.relu(x), size, mode, "sizes", coordinate_transformation_mode="asymmetric", nearest_mode="floor", axes=axes
    )
    weights = np.random.default_rng(7).standard_normal((6, 5, kernel, kernel)).astype(np.float32)
    convolved = ops.convolution(large, ops.constant(weights), [1, 1], [pad, pad], [pad, pad], [1, 1])
    results = [ops.result(ops.relu(convolved)), *([ops.result(ops.relu(large))] if shared else [])]
    return openvino.Model(results, [x])


def run(model) -> np.ndarray:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled(X)[compiled.output(0)]


def test_it_gives_the_same_numbers() -> None:
    plain, folded = graph(), graph()
    assert fold_upsampling(folded) == 1
    kinds = [node.get_type_name() for node in folded.get_ops()]
    assert kinds.count("Convolution") == 4 and "Interpolate" not in kinds
    expected = run(plain)
    assert expected.shape == (2, 6, 16, 18) and np.abs(run(folded) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "other",
    [{"factor": 3}, {"mode": "linear_onnx"}, {"kernel": 1, "pad": 0}, {"pad": 0}, {"shared": True}, {"height": 4}],
    ids=str,
)
def test_other_subgraphs_are_left_unchanged(other: dict) -> None:
    model = graph(**other)
    assert fold_upsampling(model) == 0
    assert [node.get_type_name() for node in model.get_ops()].count("Convolution") == 1


def test_shapes_that_are_not_known_are_left_alone() -> None:
    model = graph()
    model.reshape([-1, 5, -1, -1])
    assert fold_upsampling(model) == 0
