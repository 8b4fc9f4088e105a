"""The loop that keeps its tensors on the device gives what the pipeline's NumPy loop gives, on ONNX Runtime's CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.onnxruntime_device import OnnxRuntimeDevice
from ldm_runtime.bundle import Bundle
from ldm_runtime.device_loop import GUIDED_STEP, STEP, DeviceLoop
from ldm_runtime.errors import BackendError
from ldm_runtime.request import Request

OPTIONS = {"seed": 3, "num_inference_steps": 5}


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def numpy_loop(bundle: Bundle) -> Iterator[LatentDiffusionPipeline]:
    with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", device="cpu") as pipeline:
        yield pipeline


@pytest.fixture
def device_loop(bundle: Bundle) -> Iterator[LatentDiffusionPipeline]:
    components = bundle.manifest.components
    graphs = {name: (bundle.graph(name, "fp32"), components[name].spec) for name in ("unet", STEP, GUIDED_STEP)}
    with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", device="cpu") as pipeline:
        pipeline.loop = DeviceLoop(lambda: OnnxRuntimeDevice(graphs, "cpu"))
        yield pipeline


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0.0, "guidance_scale": 6.0},
        {"eta": 0.3, "guidance_scale": 6.0},
        {"eta": 0.3, "guidance_scale": 1.0},
        {"eta": 1.0, "guidance_scale": 2.5, "images_per_prompt": 2, "seed": [5, 6], "height": 72, "width": 88},
    ],
)
def test_every_step_agrees_with_the_numpy_loop(
    numpy_loop: LatentDiffusionPipeline, device_loop: LatentDiffusionPipeline, options: dict[str, Any]
) -> None:
    request = Request("a red circle", negative_prompt="blue", **OPTIONS | options)
    steps = zip(numpy_loop.steps(request), device_loop.steps(request), strict=True)
    for one, other in steps:
        assert (one.index, one.total, one.timestep) == (other.index, other.total, other.timestep)
        np.testing.assert_allclose(other.latents, one.latents, atol=2e-4 * np.abs(one.latents).max())
        assert other.latents is other.latents


def test_shapes_may_change_from_request_to_request(
    numpy_loop: LatentDiffusionPipeline, device_loop: LatentDiffusionPipeline
) -> None:
    for options in ({"height": 64}, {"height": 80}, {"height": 64}):
        found, expected = (
            np.asarray(pipeline("a blue square", guidance_scale=6.0, **OPTIONS | options).images[0], int)
            for pipeline in (device_loop, numpy_loop)
        )
        assert np.abs(found - expected).max() <= 1


def test_a_second_request_ends_the_first(device_loop: LatentDiffusionPipeline) -> None:
    first, second = (device_loop.steps(Request(prompt, **OPTIONS)) for prompt in ("a red circle", "a blue square"))
    next(first)
    next(second)
    with pytest.raises(BackendError, match="has begun another request"):
        next(first)
    assert len(list(second)) == 4


def test_steps_that_clip_take_the_numpy_loop(bundle: Bundle) -> None:
    """Their x_0 is bounded, which no coefficients say: the device is not even opened."""

    def never() -> OnnxRuntimeDevice:
        raise AssertionError

    with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", device="cpu") as pipeline:
        pipeline.scheduler = type(pipeline.scheduler)(clip_sample=True)
        pipeline.loop = DeviceLoop(never)
        assert len(pipeline("a red circle", **OPTIONS).images) == 1


def test_closing_frees_and_the_next_request_opens_anew(device_loop: LatentDiffusionPipeline) -> None:
    before = device_loop("a red circle", **OPTIONS).latents
    assert device_loop.loop is not None
    device_loop.loop.close()
    device_loop.loop.close()
    np.testing.assert_array_equal(device_loop("a red circle", **OPTIONS).latents, before)


def test_missing_cuda_is_reported_in_one_line(bundle: Bundle) -> None:
    spec = bundle.manifest.components[STEP].spec
    device = OnnxRuntimeDevice({STEP: (bundle.graph(STEP, "fp32"), spec)})
    tensors = {tensor.name: (tensor.bounds("opt"), tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)}
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has a CUDA provider here")
    with pytest.raises(BackendError, match=r"^this onnxruntime has no CUDA provider; `pip install"):
        device.hold(tensors, (STEP,))
