"""External data of a graph: every reference is found, and one to a file without a digest is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import onnx
import pytest
from hypothesis import given
from onnx import TensorProto, helper, numpy_helper

from ldm_runtime import Bundle
from ldm_runtime.bundle import file_facts
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import ManifestError
from ldm_runtime.onnx_external import external_locations
from tests.support.small_bundle import write_small_bundle


def tensor(location: str) -> onnx.TensorProto:
    """A tensor whose data lies in a file."""
    result = numpy_helper.from_array(np.zeros(2, np.float32), location)
    result.ClearField("raw_data")
    result.data_location = TensorProto.EXTERNAL
    for key, value in (("offset", "0"), ("location", location), ("length", "8")):
        result.external_data.add(key=key, value=value)
    return result


def sparse(location: str) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(tensor(f"{location}.values"), tensor(f"{location}.indices"), [4])


def graph(name: str, *nodes: onnx.NodeProto, **parts: list) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [], **parts)


def model_with_every_place() -> tuple[onnx.ModelProto, set[str]]:
    branch = onnx.NodeProto(op_type="If")
    branch.attribute.add(name="then_branch").g.CopyFrom(graph("inner", initializer=[tensor("subgraph")]))
    deep = graph("outer", branch)
    node = onnx.NodeProto(op_type="Any")
    node.attribute.add(name="t").t.CopyFrom(tensor("attribute"))
    node.attribute.add(name="ts").tensors.append(tensor("attribute list"))
    node.attribute.add(name="g").g.CopyFrom(deep)
    node.attribute.add(name="gs").graphs.append(graph("listed", initializer=[tensor("graph list")]))
    node.attribute.add(name="s").sparse_tensor.CopyFrom(sparse("sparse attribute"))
    node.attribute.add(name="ss").sparse_tensors.append(sparse("sparse list"))
    top = graph("top", node, initializer=[tensor("initializer"), tensor("other")])
    top.sparse_initializer.append(sparse("sparse initializer"))
    model = helper.make_model(top)
    inner = onnx.NodeProto(op_type="Constant")
    inner.attribute.add(name="value").t.CopyFrom(tensor("function"))
    function = model.functions.add(name="f", domain="d")
    function.node.append(inner)
    function.attribute_proto.add(name="default").t.CopyFrom(tensor("function attribute"))
    model.training_info.add().initialization.CopyFrom(graph("i", initializer=[tensor("training")]))
    model.training_info[0].algorithm.CopyFrom(graph("a", initializer=[tensor("algorithm")]))
    places = {"attribute", "attribute list", "subgraph", "graph list", "initializer", "other", "function"}
    places |= {"function attribute", "training", "algorithm"}
    both = ("sparse attribute", "sparse list", "sparse initializer")
    return model, places | {f"{name}.{part}" for name in both for part in ("values", "indices")}


def test_every_place_of_a_tensor_is_found(tmp_path: Path) -> None:
    model, places = model_with_every_place()
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_locations(tmp_path / "m.onnx") == places


def test_subgraphs_may_be_nested_deeper_than_a_stack(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while True:
            size, low = size >> 7, size & 0x7F
            length += bytes([low | (0x80 if size else 0)])
            if not size:
                return bytes([number << 3 | 2]) + length + content

    content = graph("deepest", initializer=[tensor("w")]).SerializeToString()
    for _ in range(3000):
        content = field(1, field(5, field(6, content)))  # graph: node: attribute: graph
    (tmp_path / "m.onnx").write_bytes(field(7, content))
    assert external_locations(tmp_path / "m.onnx") == {"w"}


def test_a_length_may_be_written_with_more_bytes_than_needed(tmp_path: Path) -> None:
    content = b"\x0a\x88\x00location\x12\x01w"  # key, value; the first length has two bytes
    for tag in (b"\x6a", b"\x2a", b"\x3a"):  # external_data of a tensor: initializer of a graph: of a model
        content = tag + bytes([len(content)]) + content
    (tmp_path / "m.onnx").write_bytes(content)
    assert onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer[0].external_data[0].value == "w"
    assert external_locations(tmp_path / "m.onnx") == {"w"}


def test_a_graph_with_its_data_inside_refers_to_nothing(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    assert external_locations(bundle.folder / "unet/fp32.onnx") == set()


@given(noise=st.binary(max_size=200), place=st.integers(0, 10**6))
def test_any_bytes_are_read_or_refused(noise: bytes, place: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = graph("g", initializer=[tensor("w")]).SerializeToString()
    at = place % (len(content) + 1)
    path = tmp_path_factory.getbasetemp() / "noise.onnx"
    path.write_bytes(b"location" + content[:at] + noise + content[at:])
    try:
        assert isinstance(external_locations(path), set)
    except ManifestError as error:
        assert "\n" not in str(error)


def with_reference(folder: Path, location: str, *listed: str) -> Bundle:
    """The small bundle whose decoder has a tensor in a file ``location``."""
    bundle = write_small_bundle(folder)
    path = folder / "decoder/fp32.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] == "colours":
            value = node.attribute[0].t
            data = value.raw_data
            value.CopyFrom(onnx.TensorProto(name=value.name, dims=value.dims, data_type=value.data_type))
            value.data_location = TensorProto.EXTERNAL
            value.external_data.add(key="location", value=location)
            model.graph.initializer.append(value)
            model.graph.initializer[-1].name = "colours"
            model.graph.node.remove(node)
            break
    path.write_bytes(model.SerializeToString())
    weights = path.parent / location
    weights.parent.mkdir(parents=True, exist_ok=True)
    weights.write_bytes(data)
    manifest = replace(
        bundle.manifest, files={**bundle.manifest.files, **file_facts(folder, ["decoder/fp32.onnx", *listed])}
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return Bundle.open(folder)


@pytest.mark.parametrize("location", ["w", "../w", "../../w", "./fp32.onnx.data", "sub/w"])
def test_a_reference_to_a_file_without_a_digest_is_refused(tmp_path: Path, location: str) -> None:
    bundle = with_reference(tmp_path / "bundle", location)
    for check in (lambda: bundle.graph("decoder", "fp32"), bundle.check):
        with pytest.raises(
            ManifestError, match=r"decoder/fp32\.onnx: refers to '.*', which the manifest does not list"
        ):
            check()


def test_a_listed_file_is_checked_and_read(tmp_path: Path) -> None:
    from ldm_runtime.backends.factory import open_component

    bundle = with_reference(tmp_path / "bundle", "w", "decoder/w")
    assert [file.path.name for file in bundle.verified_graph("decoder", "fp32").beside] == ["w"]
    image = open_component(bundle, "decoder", "onnxruntime").run({"latents": np.ones((1, 4, 4, 4), np.float32)})
    assert image["image"].shape == (1, 3, 8, 8)
    (bundle.folder / "decoder/w").write_bytes(b"x")
    with pytest.raises(ManifestError, match="decoder/w: got 1 bytes"):
        bundle.graph("decoder", "fp32")


def test_a_graph_of_another_format_is_refused(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    manifest = (bundle.folder / MANIFEST).read_text().replace("decoder/fp32.onnx", "decoder/fp32.ort")
    (bundle.folder / MANIFEST).write_text(manifest)
    with pytest.raises(ManifestError, match=r"'decoder/fp32\.ort', expected the path of an \.onnx file"):
        Bundle.open(bundle.folder)
