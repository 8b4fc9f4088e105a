"""The ONNX Runtime backend: what it refuses, that its results are the caller's, and CUDA against the CPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend, providers
from ldm_runtime.errors import BackendError, ManifestError, SpecError
from ldm_runtime.installation import install_command
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec

BATCH = Axis("batch", 1, 2, 4)
SPEC = ComponentSpec("twice", (TensorSpec("x", "float32", (BATCH, 3)),), (TensorSpec("y", "float32", (BATCH, 3)),))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = x + x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy")
    model = helper.make_model(
        helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "twice.onnx")
    return tmp_path / "twice.onnx"


def test_it_runs_and_its_results_are_the_callers(graph: Path) -> None:
    backend = OnnxRuntimeBackend(graph, SPEC, "cpu", threads=1)
    assert (backend.inputs, backend.outputs, backend.device) == (SPEC.inputs, SPEC.outputs, "cpu")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    first = backend.run({"x": x})["y"]
    copy = first.copy()
    second = backend.run({"x": x + 1})["y"]
    assert np.array_equal(first, copy) and np.array_equal(second, 2 * x + 2)
    first[:] = -1
    assert np.array_equal(backend.run({"x": x})["y"], 2 * x)


def test_arrays_that_are_not_contiguous_are_taken_as_they_read(graph: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    assert np.array_equal(OnnxRuntimeBackend(graph, SPEC, "cpu").run({"x": x})["y"], 2 * x)


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "got inputs []"),
        ({"z": np.zeros((1, 3), np.float32)}, "['z']"),
        ({"x": np.zeros((1, 3))}, "float64 [1, 3]"),
        ({"x": np.zeros((1, 4), np.float32)}, "expected 3 where 4 stands"),
        ({"x": np.zeros((5, 3), np.float32)}, "must lie in 1..4"),
        ({"x": np.zeros(3, np.float32)}, "rank"),
    ],
)
def test_feeds_that_do_not_fit(graph: Path, feed: dict, message: str) -> None:
    with pytest.raises(SpecError, match="twice") as caught:
        OnnxRuntimeBackend(graph, SPEC, "cpu").run(feed)
    assert message in str(caught.value)


def test_what_cannot_be_loaded(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.onnx").write_bytes(graph.read_bytes()[:40])
    with pytest.raises(BackendError, match=r"torn\.onnx"):
        OnnxRuntimeBackend(tmp_path / "torn.onnx", SPEC)
    other = ComponentSpec("twice", (TensorSpec("a", "float32", (BATCH, 3)),), SPEC.outputs)
    with pytest.raises(ManifestError, match=r"inputs are \['x'\], the manifest says \['a'\]"):
        OnnxRuntimeBackend(graph, other)
    with pytest.raises(BackendError, match="expected auto, cpu or cuda"):
        OnnxRuntimeBackend(graph, SPEC, "tpu")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=re.escape(install_command("onnxruntime"))):
        OnnxRuntimeBackend(graph, SPEC)


def test_cuda_is_refused_where_there_is_no_provider() -> None:
    assert providers("auto", ["CPUExecutionProvider"]) == ["CPUExecutionProvider"]
    assert providers("auto", ["CUDAExecutionProvider", "CPUExecutionProvider"])[0] == "CUDAExecutionProvider"
    with pytest.raises(BackendError, match=re.escape(f"no CUDA provider; `{install_command('gpu')}`")):
        providers("cuda", ["CPUExecutionProvider"])


@pytest.mark.gpu
def test_cuda_gives_the_cpus_image(shapes_bundle: Path) -> None:
    all_images = []
    for device in ("cpu", "cuda"):
        with LatentDiffusionPipeline.from_bundle(Bundle.open(shapes_bundle).folder, device=device) as pipeline:
            result = pipeline("a large red circle in the center on a white background", seed=1, guidance_scale=6.0)
            all_images.append(np.asarray(result.images[0]).astype(int))
    assert np.abs(all_images[0] - all_images[1]).max() <= 2
