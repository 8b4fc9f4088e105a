"""Tensors on a device, the cache of their shapes, and the backend that runs a component on them; on the host here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ldm_runtime.backends.device_backend import KEPT_SHAPES, DeviceBackend
from ldm_runtime.backends.memory import HostMemory, memory_of
from ldm_runtime.backends.onnxruntime_launcher import Mode, OnnxRuntimeLauncher
from ldm_runtime.device import Call, Region, Workspace, WorkspaceCache
from ldm_runtime.errors import BackendError, SpecError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec
from tests.support.numpy_model import numpy_pipeline

ROWS = Axis("rows", 1, 2, 64)
SPEC = ComponentSpec("twice", (TensorSpec("x", "float32", (ROWS, 3)),), (TensorSpec("y", "float32", (ROWS, 3)),))


@pytest.fixture(params=[TensorProto.FLOAT, TensorProto.FLOAT16], ids=["fp32", "fp16"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> DeviceBackend:
    """y = x + x, in the spec's dtype or in half precision."""
    x, y = (helper.make_tensor_value_info(name, request.param, ["rows", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "twice", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "g.onnx")
    memory = HostMemory()
    return DeviceBackend(OnnxRuntimeLauncher(tmp_path / "g.onnx", SPEC, memory, half=True), SPEC, memory)


def test_a_backend_converts_from_and_to_the_dtypes_of_the_spec(backend: DeviceBackend) -> None:
    assert (backend.inputs, backend.outputs, backend.device) == (SPEC.inputs, SPEC.outputs, "cpu")
    assert backend.launcher.mode is Mode.PLAIN
    for rows in (2, 3, 2):
        x = np.arange(3 * rows, dtype=np.float32).reshape(3, rows).T
        first = backend.run({"x": x})["y"]
        assert first.dtype == np.float32 and np.array_equal(first, 2 * x)
        backend.run({"x": x + 1})
        assert np.array_equal(first, 2 * x)
    with pytest.raises(SpecError, match=r"float64 \[1, 3\]"):
        backend.run({"x": np.zeros((1, 3))})


def test_a_backend_keeps_the_shapes_used_last(backend: DeviceBackend) -> None:
    for rows in range(1, KEPT_SHAPES + 3):
        backend.run({"x": np.ones((rows, 3), np.float32)})
    kept = [f"twice for x [{rows}, 3]" for rows in range(3, KEPT_SHAPES + 3)]
    assert list(backend.memory()) == kept and min(backend.memory().values()) >= 2 * 3 * 3 * 2
    backend.close()
    assert backend.memory() == {}


def workspace(memory: HostMemory, rows: int) -> Workspace:
    return Workspace(memory, {"a": ((rows, 2), "float32"), "b": ((rows, 2), "float16")}, {}, f"{rows} rows")


def test_tensors_are_zero_at_first_and_are_written_read_and_copied_by_rows() -> None:
    memory = HostMemory()
    space = workspace(memory, 4)
    assert not space.read("a").any() and not space.read("b").any()
    space.write("a", np.array([[1, 2], [3, 4]], np.int64), 1)
    space.write_ahead("b", np.full((1, 2), 0.5), 3)
    space.copy(space.regions["a"].rows(1, 2), space.regions["a"].rows(3, 4))
    assert space.read("a").tolist() == [[0, 0], [1, 2], [3, 4], [1, 2]] and space.read("a", 2, 3).tolist() == [[3, 4]]
    assert space.read("b").tolist() == [[0, 0]] * 3 + [[0.5, 0.5]]
    addresses = [region.address % 64 for region in space.regions.values()]
    assert addresses[0] == addresses[1] and space.bytes == memory.used() == 512
    space.close()
    assert memory.used() == 0


@pytest.mark.parametrize(
    "misuse",
    [
        lambda space: space.write("a", np.zeros((2, 3), np.float32)),
        lambda space: space.write("a", np.zeros((2, 2), np.float32), 3),
        lambda space: space.read("a", 4),
        lambda space: space.copy(space.regions["a"], space.regions["b"]),
    ],
)
def test_no_copy_leaves_its_tensor(misuse: Callable[[Workspace], object]) -> None:
    with pytest.raises(BackendError, match="report it"):
        misuse(workspace(HostMemory(), 4))


def test_a_component_of_another_dtype_is_refused(backend: DeviceBackend) -> None:
    memory, tensors = HostMemory(), {"x": ((1, 3), "int64"), "y": ((1, 3), "int64")}
    with pytest.raises(BackendError, match=r"twice: x is float(16|32), the device holds int64"):
        Workspace(memory, tensors, {"twice": Call(backend.launcher, {})}, "wrong")
    assert memory.used() == 0


def test_spread_rows_lie_a_pitch_apart() -> None:
    memory = HostMemory()
    source, target = memory.allocate(6), memory.allocate(12)
    memory.upload(np.arange(6, dtype=np.uint8), source)
    memory.spread(Region(source, (3, 2), "uint8"), target + 1, 4)
    result = np.empty(12, np.uint8)
    memory.download(target, result)
    assert result.tolist() == [0, 0, 1, 0, 0, 2, 3, 0, 0, 4, 5, 0]


def test_the_cache_frees_what_was_not_used_for_the_longest_time() -> None:
    memory, cache = HostMemory(), WorkspaceCache(2)
    for rows in (1, 2, 1, 3):
        cache.get(rows, lambda rows=rows: workspace(memory, rows))
    assert list(cache.bytes()) == ["1 rows", "3 rows"]
    cache.close()
    assert memory.used() == 0


def test_the_cache_frees_all_when_memory_is_short() -> None:
    memory, cache = HostMemory(), WorkspaceCache()
    cache.get(1, lambda: workspace(memory, 1))

    def large() -> Workspace:
        if memory.used():
            raise BackendError("cudaMalloc: out of memory")
        return workspace(memory, 2)

    cache.get(2, large)
    assert list(cache.bytes()) == ["2 rows"]
    with pytest.raises(BackendError, match="out of memory"):
        cache.get(3, lambda: (_ for _ in ()).throw(BackendError("out of memory")))


def test_an_unknown_device() -> None:
    with pytest.raises(BackendError, match="got 'tpu', expected cpu or cuda"):
        memory_of("tpu", "gpu")


class SmallMemory(HostMemory):
    """Memory of a device with so many bytes."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def available(self) -> int | None:
        return self.size - self.used()


def test_images_are_decoded_together_as_far_as_memory_reaches(tmp_path: Path) -> None:
    pipeline, size = numpy_pipeline(tmp_path), 10_000
    graph, spec = write_decoder(tmp_path / "decoder.onnx"), pipeline.model.components["decoder"]
    latents = np.random.default_rng(0).standard_normal((30, 4, 6, 6)).astype(np.float32)
    expected = pipeline.decode_array(latents)
    memory = SmallMemory(size)
    decoder = DeviceBackend(OnnxRuntimeLauncher(graph, spec, memory), spec, memory)
    pipeline.backends["decoder"] = decoder
    assert decoder.most_rows({"latents": latents}) == 1 and pipeline.decodes_together(latents[:1])
    np.testing.assert_allclose(pipeline.decode_array(latents), expected, atol=1e-6)
    rows = [int(label.split("[")[1].split(",")[0]) for label in decoder.memory()]
    assert 1 < max(rows) < 29 and memory.used() <= size


def write_decoder(file: Path) -> Path:
    """The decoder of the NumPy model as a graph."""
    nodes = [
        helper.make_node("Gather", ["latents", "colours"], ["chosen"], axis=1),
        helper.make_node("Resize", ["chosen", "", "scales"], ["large"], mode="nearest"),
        helper.make_node("Mul", ["large", "share"], ["scaled"]),
        helper.make_node("Add", ["scaled", "half"], ["image"]),
    ]
    constants = {
        "colours": np.arange(3),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "share": np.array(0.2, np.float32),
        "half": np.array(0.5, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["images", 4, "height", "width"])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["images", 3, "2*height", "2*width"])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    return file
