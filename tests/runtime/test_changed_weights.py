"""Graphs with changed weights: what they compute, the memory that they take, and a temporary folder without room."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ldm_runtime.backends import Backend
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.errors import BackendError
from ldm_runtime.loras.adapter_file import LoraAdapter, LowRankPair
from ldm_runtime.loras.changes import weight_changes
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec
from ldm_runtime.verified_file import FileIdentity, VerifiedFile

SIZE, LAYERS = 2048, 3
BYTES = LAYERS * SIZE * SIZE * 4
ROWS = Axis("batch", 1, 1, 2)
SPEC = ComponentSpec("unet", (TensorSpec("x", "float32", (ROWS, SIZE)),), (TensorSpec("y", "float32", (ROWS, SIZE)),))
Open = Callable[..., Backend]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrix products whose weights, 50 MB, lie beside the graph."""
    generator, names = np.random.default_rng(0), ["x", *(f"h{index}" for index in range(1, LAYERS)), "y"]
    weights = [generator.standard_normal((SIZE, SIZE), np.float32) / SIZE**0.5 for _ in range(LAYERS)]
    stored = [numpy_helper.from_array(weight, f"w{index}") for index, weight in enumerate(weights)]
    nodes = [
        helper.make_node("MatMul", [names[index], f"w{index}"], [names[index + 1]], name=f"unet.layer{index}/MatMul")
        for index in range(LAYERS)
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", SIZE]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "unet", ports[:1], ports[1:], stored)
    file = tmp_path_factory.mktemp("changed") / "fp32.onnx"
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, file, save_as_external_data=True, location="fp32.onnx.data")
    return file


@pytest.fixture(scope="module")
def adapter(graph: Path) -> LoraAdapter:
    """An adapter of rank 2 that changes every layer."""
    generator = np.random.default_rng(1)
    pairs = {
        ("unet", f"layer{index}"): LowRankPair(
            generator.standard_normal((2, SIZE), np.float32), generator.standard_normal((SIZE, 2), np.float32) / SIZE
        )
        for index in range(LAYERS)
    }
    return LoraAdapter("style", pairs, VerifiedFile(graph, "", FileIdentity.of(graph.stat())))


def anonymous() -> int:
    """Bytes of this process's memory that belong to no file."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) * 1024


@pytest.mark.parametrize("open_graph", [OnnxRuntimeBackend, OpenVinoBackend])
def test_a_selection_takes_the_memory_of_its_weights_once(graph: Path, adapter: LoraAdapter, open_graph: Open) -> None:
    feed = {"x": np.random.default_rng(2).standard_normal((1, SIZE), np.float32)}
    base = open_graph(graph, SPEC)
    plain = base.run(feed)["y"]
    before = anonymous()
    changed = open_graph(graph, SPEC, changes=weight_changes("unet", [(adapter, 0.5)], graph))
    result = changed.run(feed)["y"]
    assert anonymous() - before < 1.3 * BYTES
    changed.close()
    assert anonymous() - before < 0.3 * BYTES
    expected = feed["x"]
    for index, stored in enumerate(onnx.load(graph).graph.initializer):
        pair = adapter.pairs["unet", f"layer{index}"]
        expected = expected @ (numpy_helper.to_array(stored, str(graph.parent)) + 0.5 * (pair.up @ pair.down).T)
    assert np.allclose(result, expected, atol=1e-3) and not np.allclose(plain, expected, atol=0.02)
    assert (base.run(feed)["y"] == plain).all()


@pytest.mark.parametrize("open_graph", [OnnxRuntimeBackend, OpenVinoBackend])
def test_a_temporary_folder_without_room(graph: Path, adapter: LoraAdapter, open_graph: Open) -> None:
    changes = weight_changes("unet", [(adapter, 0.5)], graph)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(BackendError, match=r"cannot write a copy .* it takes 0\.1 GB, set TMPDIR to a folder"):
            open_graph(graph, SPEC, changes=changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
