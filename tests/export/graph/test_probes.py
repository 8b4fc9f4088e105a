"""Probes report what the tensors of a graph hold, and leave its outputs unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ldm_calibration.probes import HIGHEST, LARGEST, LOWEST, add_extremes, add_largest, add_outputs, add_shapes
from ldm_export.graph.onnx_graph import save_graph
from ldm_runtime.errors import BuildError
from tests.export.graph.whole import Whole, largest_difference, run


def computed(model: ir.Model) -> list[str]:
    return [v.name or "" for node in model.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]


def run_probe(model: ir.Model, feed: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    save_graph(model, folder / "probe.onnx")
    return run(folder / "probe.onnx", feed)


@pytest.fixture(scope="module")
def feed(wholes: dict[str, Whole]) -> dict[str, np.ndarray]:
    return wholes["conditional"].feed(2, 9, 7)


@pytest.fixture(scope="module")
def tensors(
    wholes: dict[str, Whole], feed: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Every float tensor of the graph, taken out whole."""
    model = wholes["conditional"].model
    names = computed(model)
    assert add_outputs(model, names) == tuple(name for name in names if name != "noise_pred")
    result = run_probe(model, feed, tmp_path_factory.mktemp("tensors"))
    expected = run(wholes["conditional"].path, feed)["noise_pred"]
    assert largest_difference(result["noise_pred"], expected) <= 1e-5  # ONNX Runtime fuses fewer nodes of this graph
    return result


def test_extremes_are_maximum_and_minimum(
    wholes: dict[str, Whole], feed: dict[str, np.ndarray], tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model = wholes["conditional"].model
    names = add_extremes(model)
    assert names == computed(wholes["conditional"].model)
    result = run_probe(model, feed, tmp_path)
    assert list(result) == ["noise_pred", HIGHEST, LOWEST]
    np.testing.assert_allclose(result[HIGHEST], [tensors[name].max() for name in names], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(result[LOWEST], [tensors[name].min() for name in names], rtol=1e-4, atol=1e-5)


def test_extremes_of_some_tensors(wholes: dict[str, Whole], feed: dict[str, np.ndarray], tmp_path: Path) -> None:
    model = wholes["conditional"].model
    chosen = [computed(model)[40], computed(model)[3]]
    assert add_extremes(model, chosen) == chosen
    assert run_probe(model, feed, tmp_path)[HIGHEST].shape == (2,)


def test_largest_is_the_magnitude(
    wholes: dict[str, Whole], feed: dict[str, np.ndarray], tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model = wholes["conditional"].model
    values = computed(model)[::3]
    names = add_largest(model, ["sample", *values, values[0]])
    assert list(names) == values
    result = run_probe(model, feed, tmp_path)[LARGEST]
    np.testing.assert_allclose(result, [np.abs(tensors[name]).max() for name in names], rtol=1e-4, atol=1e-5)


def test_shapes_are_those_of_one_call(
    wholes: dict[str, Whole], feed: dict[str, np.ndarray], tensors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    model = wholes["conditional"].model
    values = computed(model)[::5]
    outputs = add_shapes(model, values)
    result = run_probe(model, feed, tmp_path)
    assert {name: tuple(result[output]) for output, name in outputs.items()} == {n: tensors[n].shape for n in values}


def test_unknown_tensors_and_none_are_refused(wholes: dict[str, Whole]) -> None:
    for add in (add_extremes, add_largest, add_outputs, add_shapes):
        with pytest.raises(BuildError, match=r"got tensor 'nothing', expected one that a node of the graph computes"):
            add(wholes["conditional"].model, ["nothing"])
    with pytest.raises(BuildError, match="got no tensor to measure"):
        add_largest(wholes["conditional"].model, ["sample"])
