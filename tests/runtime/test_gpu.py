"""On an NVIDIA GPU: engines, graphs on CUDA and the loop on the device give what ONNX Runtime gives on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.report.contents import ReportOptions, make_report
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.driver import Gpu, installed_gpu
from ldm_runtime.backends.engine_advice import RTX_CAPABILITIES
from ldm_runtime.backends.engine_match import match_engine
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.backends.tensorrt import TensorRtBackend
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import TABLE_CALLS
from ldm_runtime.errors import BackendError
from ldm_runtime.images import psnr
from ldm_runtime.request import Request
from ldm_runtime.specs import ComponentSpec, dummy_inputs

pytestmark = pytest.mark.gpu
COMPONENTS = ("text_encoder", "cross_attention_kv", "time_embedding", "unet", "decoder")
PROMPT = "a small red circle left of a large blue square on a yellow background"
OPTIONS: dict[str, Any] = {"seed": 3, "eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 20}


@pytest.fixture(scope="module")
def capability() -> str:
    return Cuda().capability()


@pytest.fixture(scope="module")
def for_this_gpu(shapes_engines: Bundle, capability: str) -> Bundle:
    """The bundle with engines, where they are for the GPU at hand."""
    if capability not in shapes_engines.manifest.components["unet"].engines[0].compute_capabilities:
        pytest.skip(f"no engine is for compute capability {capability}")
    return shapes_engines


@pytest.fixture(params=["for_this_gpu", "shapes_engines", "shapes_cuda"])
def on_gpu(request: pytest.FixtureRequest) -> Iterator[LatentDiffusionPipeline]:
    """A pipeline on TensorRT, on ONNX Runtime with portable fp16 graphs, or with those for CUDA."""
    bundle = request.getfixturevalue(request.param)
    backend, device = ("tensorrt", "auto") if request.param == "for_this_gpu" else ("onnxruntime", "cuda")
    with LatentDiffusionPipeline.from_bundle(bundle, backend=backend, device=device) as pipeline:
        yield pipeline


def image(pipeline: LatentDiffusionPipeline, **options: Any) -> np.ndarray:
    return np.asarray(pipeline(PROMPT, **OPTIONS | options).images[0], np.float64)


def close(one: np.ndarray, other: np.ndarray, least: float) -> bool:
    result = psnr(one, other, 255.0)
    return result is None or result >= least


def smallest(spec: ComponentSpec) -> dict[str, Any]:
    feed = dummy_inputs(spec, "opt")
    return {name: array * 37 if name == "timestep" else array for name, array in feed.items()}


@pytest.mark.parametrize("name", COMPONENTS)
def test_each_engine_gives_what_its_graph_gives_on_the_cpu(for_this_gpu: Bundle, name: str) -> None:
    spec = for_this_gpu.manifest.components[name].spec
    engine = TensorRtBackend(match_engine(for_this_gpu, name, "fp16"))
    graph = OnnxRuntimeBackend(for_this_gpu.graph(name, "fp16"), spec, "cpu")
    for _ in range(2):  # the second is the captured graph
        results, references = (backend.run(smallest(spec)) for backend in (engine, graph))
        assert results.keys() == references.keys()
        for output, result in results.items():
            expected = references[output]
            assert result.dtype == expected.dtype and result.shape == expected.shape
            assert np.abs(result - expected).max() <= 0.02 * np.abs(expected).max()
    engine.close()


def test_the_image_is_that_of_the_cpu(on_gpu: LatentDiffusionPipeline, shapes_engines: Bundle) -> None:
    with LatentDiffusionPipeline.from_bundle(
        shapes_engines, backend="onnxruntime", device="cpu", precision="fp32"
    ) as reference:
        other_size = {"height": 72} if _any_size(on_gpu) else {}
        for options in ({}, {"guidance_scale": 1.0}, {"eta": 0.0}, other_size):
            assert close(image(on_gpu, **options), image(reference, **options), 40)


@pytest.mark.parametrize("steps", [20, TABLE_CALLS + 6])
def test_the_loop_on_the_device_is_the_numpy_loop(on_gpu: LatentDiffusionPipeline, steps: int) -> None:
    assert on_gpu.loop is not None
    on_device = image(on_gpu, num_inference_steps=steps)
    assert close(on_device, image(on_gpu, num_inference_steps=steps), 60)
    loop, on_gpu.loop = on_gpu.loop, None
    in_numpy = image(on_gpu, num_inference_steps=steps)
    on_gpu.loop = loop
    assert close(on_device, in_numpy, 45)


def test_shapes_may_alternate_and_are_kept(on_gpu: LatentDiffusionPipeline) -> None:
    assert on_gpu.loop is not None
    first, four = image(on_gpu), {"images_per_prompt": 4, "eta": 1.0}
    several = image(on_gpu, **four)
    again, several_again = image(on_gpu), image(on_gpu, **four)
    assert close(again, first, 60)
    assert close(several_again, several, 50)  # 20 steps with the most noise enlarge differences of rounding
    memory = on_gpu.loop.memory()
    assert len(memory) == 2 and all(size > 0 for size in memory.values())


def test_requests_in_a_batch_on_the_device(on_gpu: LatentDiffusionPipeline) -> None:
    requests = [
        Request(PROMPT, **OPTIONS | {"seed": seed, "num_inference_steps": steps, "guidance_scale": scale})
        for seed, steps, scale in ((1, 20, 6.0), (2, 9, 6.0), (3, 12, 1.0), (4, 70, 3.0), (5, 20, 1.0))
    ]
    expected = []
    for request in requests:
        *_, last = on_gpu.steps(request)
        expected.append(np.asarray(on_gpu.decode(last.latents)[0], np.float64))
    with BatchScheduler(on_gpu, Limits(max_rows=8)) as scheduler:
        results = [scheduler.submit(request) for request in requests]
        for one, other in zip(results, expected, strict=True):
            assert close(one.result(120).images[0].astype(np.float64), other, 40)


def test_in_fp32_onnxruntime_generates_the_same_image(shapes_engines: Bundle) -> None:
    all_images = []
    for device in ("cuda", "cpu"):
        with LatentDiffusionPipeline.from_bundle(
            shapes_engines, backend="onnxruntime", device=device, precision="fp32"
        ) as pipeline:
            all_images.append(image(pipeline))
    assert close(*all_images, 45)  # TF32 may be used


def test_the_driver_has_the_gpu_that_cuda_uses(capability: str) -> None:
    gpu = installed_gpu()
    assert isinstance(gpu, Gpu), gpu
    assert gpu.capability == capability and gpu.cuda >= (12, 0)


@pytest.fixture
def for_other_gpus(shapes_engines: Bundle, capability: str) -> Bundle:
    """The bundle with engines, where they are for other GPUs than the one at hand."""
    if capability in shapes_engines.manifest.components["unet"].engines[0].compute_capabilities:
        pytest.skip("the engines are for this GPU")
    return shapes_engines


def test_an_engine_for_other_gpus_is_refused_before_it_is_opened(for_other_gpus: Bundle, capability: str) -> None:
    with pytest.raises(BackendError, match=rf"this GPU has {capability}; ") as caught:
        LatentDiffusionPipeline.from_bundle(for_other_gpus, backend="tensorrt")
    buildable = capability in RTX_CAPABILITIES
    assert (f"--compute-capability {capability}" in str(caught.value)) is buildable
    assert ("use --backend onnxruntime" in str(caught.value)) is not buildable


def test_auto_goes_on_from_engines_for_other_gpus_to_onnxruntime_on_cuda(
    for_other_gpus: Bundle, capability: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx")  # without the package, "auto" does not consider its engines
    caplog.set_level("WARNING")
    with LatentDiffusionPipeline.from_bundle(for_other_gpus) as pipeline:
        choice = pipeline.choice
        assert choice is not None
        assert (choice.backend, choice.device, choice.graph) == ("onnxruntime", "cuda", "fp16")
        assert "tensorrt cannot be used: " in choice.reason and f"this GPU has {capability}" in choice.reason
        on_gpu = image(pipeline)
        assert pipeline.choice is choice
    assert [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()] == [
        f"{choice.reason.partition('; ')[2]}; onnxruntime runs the model instead"
    ]
    with LatentDiffusionPipeline.from_bundle(
        for_other_gpus, backend="onnxruntime", device="cpu", precision="fp32"
    ) as reference:
        assert close(on_gpu, image(reference), 40)


def test_a_report_has_images_of_every_precision(shapes_engines: Bundle) -> None:
    report = make_report(shapes_engines, [{"prompts": PROMPT}], ReportOptions(steps=2))
    assert {name: (one.failure, len(one.images)) for name, one in report.results.items()} == {
        "fp32": (None, 1),
        "fp16": (None, 1),
    }


def test_auto_goes_on_to_the_cpu_if_gpu_memory_is_short(shapes_bundle: Path) -> None:
    cuda, blocks = Cuda(), list[Any]()
    try:
        for size in (2**30, 2**26, 2**22, 2**21):
            with suppress(BackendError):
                while True:
                    blocks.append(cuda.call("cudaMalloc", size))
        with LatentDiffusionPipeline.from_bundle(shapes_bundle, precision="fp32") as pipeline:
            short = image(pipeline, num_inference_steps=2)
            assert pipeline.choice is not None and pipeline.choice.device == "cpu"
            assert "onnxruntime cannot be used: " in pipeline.choice.reason
    finally:
        for block in blocks:
            cuda.call("cudaFree", block)
    with LatentDiffusionPipeline.from_bundle(shapes_bundle, backend="onnxruntime", device="cpu") as reference:
        assert close(short, image(reference, num_inference_steps=2), 40)


def _any_size(pipeline: LatentDiffusionPipeline) -> bool:
    """True where other sizes than the model's are taken: the engines here were built for its own."""
    return pipeline.choice is not None and pipeline.choice.backend == "onnxruntime"
