"""The loop whose tensors stay on a device gives what the pipeline's NumPy loop gives, here on ONNX Runtime's CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ldm_export.graph.step_graph import export_step, step_specs
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.memory import HostMemory
from ldm_runtime.backends.onnxruntime_launcher import OnnxRuntimeLauncher
from ldm_runtime.backends.onnxruntime_session import Opening, open_session
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import GUIDED_STEP, STEP, DeviceLoop, slots_of
from ldm_runtime.device_run import LoopDevice
from ldm_runtime.errors import BackendError, ManifestError, SpecError
from ldm_runtime.request import Request
from ldm_runtime.specs import ComponentSpec
from tests.support.host_device import host_device
from tests.support.numpy_model import SCHEDULERS, numpy_pipeline, write_unet

NEW = ("euler_ancestral", "heun", "unipc")
OPTIONS: dict[str, Any] = {"seed": 3, "num_inference_steps": 5}
Graphs = dict[str, tuple[Path, ComponentSpec]]


def write_graphs(folder: Path, slots: int) -> Graphs:
    """The UNet of the NumPy model and its steps for a state of so many slots."""
    folder.mkdir(exist_ok=True)
    names = ("unet", "shallow_unet")
    graphs = {name: (folder / f"{name}.onnx", write_unet(folder / f"{name}.onnx", name)) for name in names}
    unet = graphs["unet"][1]
    for name, spec in step_specs(unet, slots, branches=2).items():
        (file,) = export_step(spec, folder / f"{name}.{slots}.onnx")
        graphs[name] = (file, spec)
    return graphs


def with_loop(folder: Path, scheduler: str) -> tuple[LatentDiffusionPipeline, LatentDiffusionPipeline]:
    """The NumPy model without and with a device loop."""
    plain, looped = (numpy_pipeline(folder, scheduler=SCHEDULERS[scheduler]) for _ in range(2))
    slots = plain.scheduler.trajectory(8).slots
    graphs = write_graphs(folder / "graphs", slots)
    assert slots_of(graphs[STEP][1]) == slots_of(graphs[GUIDED_STEP][1]) == slots
    looped.loop = DeviceLoop(lambda: host_device(graphs), slots, shallow=True)
    return plain, looped


@pytest.fixture
def ddim(tmp_path: Path) -> Iterator[tuple[LatentDiffusionPipeline, LatentDiffusionPipeline]]:
    plain, looped = with_loop(tmp_path, "ddim")
    with looped:
        yield plain, looped


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "pndm_runge_kutta", "dpm", "dpm_sde", "dpm_3", *NEW])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 6.0},
        {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 1},
        {"eta": 0.3, "guidance_scale": 1.0, "guidance_every": 2},
        {"eta": 1.0, "guidance_scale": 2.5, "images_per_prompt": 2, "seed": [5, 6], "height": 16, "width": 20},
        {"eta": 0.3, "guidance_scale": 6.0, "cache_every": 2, "full_steps": 2},
    ],
)
def test_every_step_agrees_with_the_numpy_loop(tmp_path: Path, scheduler: str, options: dict[str, Any]) -> None:
    if scheduler == "pndm_runge_kutta" and options.get("num_inference_steps") == 1:
        options = options | {"num_inference_steps": 4}
    plain, looped = with_loop(tmp_path, scheduler)
    request = Request("a", negative_prompt="b", **OPTIONS | options)
    with looped:
        assert looped.loop is not None and looped.loop.takes(looped.plan(request))
        for one, other in zip(plain.steps(request), looped.steps(request), strict=True):
            assert (one.index, one.total, one.timestep) == (other.index, other.total, other.timestep)
            np.testing.assert_allclose(other.latents, one.latents, atol=1e-5 * np.abs(one.latents).max(), rtol=0)
            assert other.latents is other.latents
    assert not any(looped.backends[name].calls for name in ("unet", "shallow_unet"))  # type: ignore[attr-defined]


def test_rescaled_guidance_runs_in_numpy(tmp_path: Path) -> None:
    plain, looped = with_loop(tmp_path, "ddim")
    request = Request("a", guidance_scale=6.0, guidance_rescale=0.7, **OPTIONS)
    with looped:
        assert looped.loop is not None and not looped.loop.takes(looped.plan(request))
        for one, other in zip(plain.steps(request), looped.steps(request), strict=True):
            assert np.array_equal(one.latents, other.latents)


DERIVED = ("cross_attention_kv", "time_embedding")


@pytest.mark.parametrize(("derived", "every"), [((), 1), (DERIVED[:1], 1), (DERIVED, 1), (DERIVED, 2)])
def test_the_loop_of_a_real_bundle(tiny_bundle: Path, derived: tuple[str, ...], every: int) -> None:
    bundle = Bundle.open(tiny_bundle)
    components = bundle.manifest.components
    names = ("unet", "shallow_unet", STEP, GUIDED_STEP, *DERIVED)
    graphs = {name: (bundle.graph(name, "fp32"), components[name].spec) for name in names}
    loop = DeviceLoop(lambda: host_device(graphs, derived), slots_of(components[STEP].spec), shallow=True)
    request = Request("a red circle", eta=0.3, guidance_scale=6.0, cache_every=every, full_steps=1, **OPTIONS)
    with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", device="cpu") as pipeline:
        expected = [step.latents for step in pipeline.steps(request)]
        for name in DERIVED:
            pipeline.backends[name].close()
        pipeline.loop = loop
        for one, other in zip(expected, pipeline.steps(request), strict=True):
            np.testing.assert_allclose(other.latents, one, atol=2e-4 * np.abs(one).max(), rtol=0)
        loaded = {name for name in DERIVED if pipeline.backends[name].is_loaded}  # type: ignore[attr-defined]
        assert loaded == set(DERIVED) - set(derived)


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_schedule_longer_than_the_tables_on_the_device(tmp_path: Path, calls: int) -> None:
    plain, looped = (numpy_pipeline(tmp_path) for _ in range(2))
    graphs = write_graphs(tmp_path / "graphs", 1)
    looped.loop = DeviceLoop(lambda: host_device(graphs), 1, calls=calls)
    request = Request("a", eta=1.0, guidance_scale=6.0, **OPTIONS)
    with looped:
        for one, other in zip(plain.steps(request), looped.steps(request), strict=True):
            np.testing.assert_allclose(other.latents, one.latents, atol=1e-5 * np.abs(one.latents).max(), rtol=0)


def test_keys_values_and_embeddings_may_be_half_precision(tmp_path: Path) -> None:
    plain, looped = (numpy_pipeline(tmp_path) for _ in range(2))
    graphs = write_graphs(tmp_path / "graphs", 1)
    graph, spec = graphs["unet"]
    take_half(graph, ("kv.0", "time_embedding"))
    with pytest.raises(ManifestError, match=r"kv\.0 is float16"):
        OnnxRuntimeLauncher(graph, spec, HostMemory())
    launcher = OnnxRuntimeLauncher(graph, spec, HostMemory(), half=True)
    dtypes = {tensor.name: tensor.dtype for tensor in (*launcher.spec.inputs, *launcher.spec.outputs)}
    assert dtypes == {
        "sample": "float32",
        "kv.0": "float16",
        "time_embedding": "float16",
        "noise_pred": "float32",
        "deep_features": "float32",
    }
    looped.loop = DeviceLoop(lambda: host_device(graphs, half=True))
    with looped:
        result, expected = (pipeline("a", guidance_scale=6.0, **OPTIONS).latents for pipeline in (looped, plain))
    assert 0 < np.abs(result - expected).max() < 5e-3 * np.abs(expected).max()


def take_half(file: Path, names: tuple[str, ...]) -> None:
    """Let a graph take float16 for some inputs, which it converts to float32."""
    model = onnx.load(file)
    for node in model.graph.node:
        node.input[:] = [f"{name}.float32" if name in names else name for name in node.input]
    for value in model.graph.input:
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            cast = helper.make_node("Cast", [value.name], [f"{value.name}.float32"], to=TensorProto.FLOAT)
            model.graph.node.insert(0, cast)
    onnx.save(model, file)


def test_the_shapes_used_last_are_kept_and_their_memory_is_reported(ddim) -> None:
    _, looped = ddim
    assert looped.loop.memory() == {}
    for height in (12, 16, 12):
        looped("a", guidance_scale=6.0, height=height, **OPTIONS)
    memory = looped.loop.memory()
    assert list(memory) == ["1 images in 2 rows of 4×8×6", "1 images in 2 rows of 4×6×6"]
    assert all(size > 2 * 4 * 6 * 6 * 4 for size in memory.values())
    looped.loop.close()
    assert looped.loop.memory() == {}


def test_shapes_may_change_from_request_to_request(ddim) -> None:
    plain, looped = ddim
    for height in (12, 16, 12):
        result, expected = (
            np.asarray(pipeline("a", guidance_scale=6.0, height=height, **OPTIONS).images[0], int)
            for pipeline in (looped, plain)
        )
        assert np.abs(result - expected).max() <= 1


def test_a_second_request_ends_the_first(ddim) -> None:
    _, looped = ddim
    first, second = (looped.steps(Request(prompt, **OPTIONS)) for prompt in ("a", "b"))
    next(first)
    next(second)
    with pytest.raises(BackendError, match="another request has started"):
        next(first)
    assert len(list(second)) == 4


@pytest.mark.parametrize(
    ("scheduler", "slots", "options"),
    [
        ("ddim_clipped", 1, {}),
        ("dpm", 1, {}),
        ("ddim", 1, {"guidance_scale": 3.0, "guidance_every": 2}),
        ("ddim", 1, {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.5)}),
    ],
)
def test_a_plan_the_device_cannot_run_is_run_in_numpy(
    tmp_path: Path, scheduler: str, slots: int, options: dict[str, Any]
) -> None:
    def never() -> LoopDevice:
        raise AssertionError("the device was opened")

    pipeline = numpy_pipeline(tmp_path, scheduler=SCHEDULERS[scheduler])
    pipeline.loop = DeviceLoop(never, slots)
    assert len(pipeline("a", **OPTIONS, **options).images) == 1
    plan = pipeline.plan(Request("a", **OPTIONS, **options))
    with pytest.raises(SpecError, match="device loop: got a plan"):
        next(pipeline.loop.steps(plan, {}, pipeline.denoiser, pipeline.begin(plan)))


def test_fewer_slots_than_the_device_has_are_enough(tmp_path: Path) -> None:
    plain, looped = (numpy_pipeline(tmp_path) for _ in range(2))
    graphs = write_graphs(tmp_path / "graphs", 3)
    looped.loop = DeviceLoop(lambda: host_device(graphs), 3)
    with looped:
        result, expected = (pipeline("a", **OPTIONS).latents for pipeline in (looped, plain))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_closing_frees_and_the_next_request_opens_anew(ddim) -> None:
    _, looped = ddim
    before = looped("a", **OPTIONS).latents
    assert looped.loop is not None
    looped.loop.close()
    looped.loop.close()
    np.testing.assert_array_equal(looped("a", **OPTIONS).latents, before)


def test_a_missing_cuda_provider_is_reported_in_one_line(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has a CUDA provider here")
    graph, spec = write_graphs(tmp_path, 1)[STEP]
    with pytest.raises(BackendError, match=r"^this onnxruntime has no CUDA provider; `pip install"):
        open_session(graph, spec, Opening("cuda"))


@pytest.mark.parametrize("name", ["cross_attention_kv", "time_embedding", "shallow_unet"])
def test_a_thread_that_uses_a_component_may_wait_for_the_memory(tmp_path: Path, name: str) -> None:
    """The loop waits for a component in use without holding the memory, which the thread that uses it waits for."""
    _, looped = with_loop(tmp_path, "ddim")
    device, used, waited = looped.loop.open(), threading.Event(), []
    lock, waiting = threading.Lock(), threading.Event()

    def in_turn(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            waiting.set()
            with lock:
                return function(*arguments)

        return called

    def use() -> None:
        with lock:
            used.set()
            assert waiting.wait(60)
            waited.append(device.memory.lock.acquire(timeout=5))
            if waited[0]:
                device.memory.lock.release()

    if name == "shallow_unet":
        object.__setattr__(device, "load_shallow", in_turn(device.load_shallow))
    else:
        backend = looped.backends[name]
        backend.run = in_turn(backend.run)  # type: ignore[method-assign]
    request = Request("a", guidance_scale=6.0, cache_every=2, full_steps=1, **OPTIONS)
    with ThreadPoolExecutor() as pool, looped:
        using = pool.submit(use)
        assert used.wait(60)
        assert len(list(looped.steps(request))) == 5
        using.result(60)
    assert waited == [True]
