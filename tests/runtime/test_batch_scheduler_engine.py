"""The batch scheduler on ONNX Runtime, with the model that ships."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from tests.support.step_gate import PROMPTS

MIXED = [
    Request(PROMPTS[0], seed=1, num_inference_steps=5, guidance_scale=1.0),
    Request(PROMPTS[1], seed=2, num_inference_steps=9, guidance_scale=6.0, eta=0.3),
    Request(PROMPTS, seed=3, num_inference_steps=4, guidance_scale=3.0),
    Request(PROMPTS[:2], seed=[4, 5], num_inference_steps=7, eta=1.0, guidance_scale=1.0),
    Request(PROMPTS[2], seed=6, num_inference_steps=3, guidance_scale=6.0, height=96, width=64),
    Request(PROMPTS[0], seed=7, num_inference_steps=6, guidance_scale=6.0, guidance_every=2, eta=0.3),
    Request(PROMPTS[1], seed=8, num_inference_steps=4, guidance_interval=(0.2, 0.6)),
    Request(PROMPTS[2], seed=9, num_inference_steps=8, images_per_prompt=2, height=96, width=64),
]


@pytest.fixture(scope="module")
def pipeline(shapes_bundle: Path) -> Iterator[LatentDiffusionPipeline]:
    with LatentDiffusionPipeline.from_bundle(shapes_bundle, backend="onnxruntime", precision="fp32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(pipeline: LatentDiffusionPipeline) -> list[np.ndarray]:
    """The images of each request of ``MIXED`` from the pipeline."""
    images = []
    for request in MIXED:
        for step in pipeline.steps(request):
            latents = step.latents
        images.append(np.stack([np.asarray(image) for image in pipeline.decode(latents)]))
    return images


def test_a_single_request_gives_exactly_the_pipelines_image(scheduler: BatchScheduler, expected) -> None:
    for request, images in zip(MIXED, expected, strict=True):
        results = scheduler.submit(request).result(60).images
        assert np.array_equal(results, images) and results.std() > 5


@pytest.mark.parametrize("limits", [Limits(max_rows=8), Limits(max_rows=32, row_buckets=(4, 16, 32))])
def test_batched_requests_differ_by_at_most_one_level(pipeline, expected, limits: Limits) -> None:
    with BatchScheduler(pipeline, limits) as scheduler:
        jobs = [scheduler.submit(request) for request in MIXED * 2]
        results = [job.result(120).images for job in jobs]
    for one, other in zip(results, expected * 2, strict=True):
        assert one.shape == other.shape and one.dtype == np.uint8
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


def test_requests_that_start_together_give_exactly_the_images_of_one_request_for_both(gated, pipeline) -> None:
    """Requests that start together make the calls that one request of both prompts makes."""
    scheduler, gate = gated(max_rows=16)
    first = scheduler.submit(Request(PROMPTS[2], seed=0, num_inference_steps=1, guidance_scale=1.0))
    gate.wait_for_call()
    options = {"num_inference_steps": 6, "eta": 0.5, "guidance_scale": 1.0}
    pair = [scheduler.submit(Request(p, seed=s, **options)) for p, s in zip(PROMPTS[:2], (3, 4), strict=True)]
    gate.open()
    results = np.concatenate([job.result(60).images for job in pair])
    assert first.result(60) and gate.rows == [1] + [2] * 6
    for step in pipeline.steps(Request(PROMPTS[:2], seed=[3, 4], **options)):
        latents = step.latents
    expected = [np.asarray(pipeline.decode(part)[0]) for part in (latents[:1], latents[1:])]
    assert np.array_equal(results, np.stack(expected))
