"""Nodes without the inputs that their operators need are refused before OpenVINO reads the graph."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.bundle import file_facts
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import ManifestError
from ldm_runtime.onnx_nodes import REQUIRED, check_nodes
from tests.support.small_bundle import write_small_bundle


def test_the_table_is_that_of_onnx() -> None:
    needed: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            needed[schema.name] = min(needed.get(schema.name, schema.min_input), schema.min_input)
    assert {name: count for name, count in needed.items() if count != 1} == REQUIRED


@pytest.mark.parametrize(
    ("operator", "inputs", "message"),
    [
        ("Conv", ["x"], r"operator 'Conv' has 1 inputs, expected at least 2"),
        ("Conv", ["x", ""], r"operator 'Conv' has 1 inputs"),
        ("Sigmoid", [], r"operator 'Sigmoid' has 0 inputs, expected at least 1"),
        ("", [], r"operator '' has 0 inputs"),
    ],
)
def test_a_node_that_lacks_an_input_is_refused(tmp_path: Path, operator: str, inputs: list[str], message: str) -> None:
    graph = helper.make_graph([helper.make_node(operator, inputs, ["y"])], "g", [], [])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(ManifestError, match=message):
        check_nodes(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("operator", "domain", "inputs"),
    [("Conv", "", ["x", "w"]), ("Conv", "com.microsoft", []), ("Resize", "", ["x", "", "s"]), ("Constant", "", [])],
)
def test_a_node_with_its_inputs_passes(tmp_path: Path, operator: str, domain: str, inputs: list[str]) -> None:
    graph = helper.make_graph([helper.make_node(operator, inputs, ["y"], domain=domain)], "g", [], [])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    check_nodes(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05\x0a\x50", b"\xff" * 20, b"\x0f"])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ManifestError, match="no ONNX graph"):
        check_nodes(tmp_path / "m.onnx")


def test_openvino_does_not_read_such_a_graph(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path)
    graph = onnx.load(str(tmp_path / "decoder/fp32.onnx"))
    (convolution,) = (node for node in graph.graph.node if node.op_type == "Conv")
    del convolution.input[1]
    (tmp_path / "decoder/fp32.onnx").write_bytes(graph.SerializeToString())
    files = {**bundle.manifest.files, **file_facts(tmp_path, ["decoder/fp32.onnx"])}
    (tmp_path / MANIFEST).write_text(type(bundle.manifest)(**{**vars(bundle.manifest), "files": files}).to_json())
    with pytest.raises(ManifestError, match="operator 'Conv' has 1 inputs"):
        LatentDiffusionPipeline.from_bundle(Bundle.open(tmp_path), backend="openvino", threads=1)
