"""One pipeline used from several threads: every image is the one that a call of its own generates."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.conditioning.text_encoder import CACHE_SIZE
from ldm_runtime.errors import BackendError
from tests.runtime.test_device_loop import with_loop
from tests.support.numpy_model import numpy_pipeline
from tests.support.small_bundle import write_small_bundle

THREADS, CALLS = 4, 24


def in_threads(pipeline: LatentDiffusionPipeline, calls: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """The latents and images of each call, made from four threads at once."""

    def call(options: dict[str, Any]) -> np.ndarray:
        result = pipeline(**options)
        return np.concatenate([result.latents.ravel(), result.arrays.ravel()])

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, calls))


def alone(pipeline: LatentDiffusionPipeline, calls: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    results = [pipeline(**options) for options in calls]
    return [np.concatenate([result.latents.ravel(), result.arrays.ravel()]) for result in results]


@pytest.mark.parametrize("keep_loaded", [True, False])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines(tmp_path: Path, backend: str, keep_loaded: bool) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    calls = [
        {"count": 1 + seed % 2, "seed": seed, "num_inference_steps": 3, "height": (8, 16)[seed % 3 == 0]}
        for seed in range(CALLS // 2)
    ]
    options: dict[str, Any] = {"backend": backend, "precision": "fp32", "threads": 1, "keep_loaded": keep_loaded}
    with LatentDiffusionPipeline.from_bundle(bundle, **options) as pipeline:
        together = in_threads(pipeline, calls)
        for one, other in zip(together, alone(pipeline, calls), strict=True):
            assert np.array_equal(one, other)


def test_texts_and_their_cache(tmp_path: Path) -> None:
    pipeline = numpy_pipeline(tmp_path)
    calls = [
        {"prompts": "abc"[index % 3] * (1 + index % 5), "negative_prompt": "b" * (index % 7), "seed": index}
        | {"num_inference_steps": 2, "guidance_scale": 3.0}
        for index in range(3 * CACHE_SIZE)
    ]
    together = in_threads(pipeline, calls)
    for one, other in zip(together, alone(numpy_pipeline(tmp_path), calls), strict=True):
        assert np.array_equal(one, other)


def test_the_loop_on_a_device_gives_the_right_image_or_none(tmp_path: Path) -> None:
    plain, looped = with_loop(tmp_path, "ddim")
    calls = [{"prompts": "a", "seed": seed, "num_inference_steps": 3, "guidance_scale": 6.0} for seed in range(CALLS)]
    expected = alone(plain, calls)
    refused = []

    def call(index: int) -> None:
        try:
            result = looped(**calls[index])
        except BackendError as error:
            refused.append(str(error))
            return
        result_values = np.concatenate([result.latents.ravel(), result.arrays.ravel()])
        assert np.abs(result_values - expected[index]).max() <= 1e-4 * np.abs(expected[index]).max()

    with looped, ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(call, range(CALLS)))
    assert all("another request has started on the device" in message for message in refused)


def test_latents_cannot_be_read_after_another_request_has_started(tmp_path: Path) -> None:
    from ldm_runtime import Request

    _, looped = with_loop(tmp_path, "ddim")
    with looped:
        *_, last = looped.steps(Request("a", seed=1, num_inference_steps=2))
        next(looped.steps(Request("a", seed=2, num_inference_steps=2)))
        with pytest.raises(BackendError, match="another request has started"):
            _ = last.latents
