"""Graphs with external weights: mapped, written again, run, also from a file with several hard links."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from ldm_calibration.graph_files import MappedTensor, files_of, graph_digest, load_graph
from ldm_calibration.model import CalibrationModel
from ldm_calibration.sessions import Session


@pytest.fixture
def external(text: CalibrationModel, tmp_path: Path) -> Path:
    """The UNet with its weights in a file of their own that has two links."""
    graph = tmp_path / "external" / "fp32.onnx"
    graph.parent.mkdir()
    ir.save(ir.load(text.graphs["unet"]), graph, external_data="fp32.onnx.data", size_threshold_bytes=256)
    (graph.parent / "second").hardlink_to(graph.parent / "fp32.onnx.data")
    return graph


def test_values_are_those_of_the_graph_with_inline_weights(text: CalibrationModel, external: Path) -> None:
    inline, mapped = load_graph(text.graphs["unet"]).graph, load_graph(external).graph
    assert isinstance(mapped.initializers["conv_mid"].const_value, MappedTensor)
    for name, value in inline.initializers.items():
        tensor = mapped.initializers[name].const_value
        assert np.array_equal(tensor.numpy(), value.const_value.numpy())
        assert tensor.tobytes() == value.const_value.tobytes() and np.array_equal(np.asarray(tensor), tensor.numpy())


def test_saved_again_the_weights_are_whole(external: Path, tmp_path: Path) -> None:
    target = tmp_path / "again" / "copy.onnx"
    target.parent.mkdir()
    ir.save(load_graph(external), target, external_data="copy.onnx.data", size_threshold_bytes=0)
    again = load_graph(target).graph
    for name, value in load_graph(external).graph.initializers.items():
        assert np.array_equal(again.initializers[name].const_value.numpy(), value.const_value.numpy())


def test_a_session_reads_the_weights_from_the_file(text: CalibrationModel, external: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {tensor.name: tensor.bounds("opt") for tensor in text.spec("unet").inputs}
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    expected = Session(load_graph(text.graphs["unet"]), text.graphs["unet"].parent).run(feed)
    result = Session(load_graph(external), external.parent).run(feed)
    assert np.array_equal(result["noise_pred"], expected["noise_pred"])
    protos = {tensor.name: tensor for tensor in ir.to_proto(load_graph(external)).graph.initializer}
    assert not protos["conv_mid"].raw_data  # the session got a reference


def test_the_digest_covers_the_weights(external: Path) -> None:
    before = graph_digest(external)
    assert len(before.split("-")) == len(files_of(external)) == 2
    with (external.parent / "fp32.onnx.data").open("r+b") as file:
        file.write(b"\x01")
    assert graph_digest(external).split("-")[0] == before.split("-")[0] and graph_digest(external) != before
