"""Requests that share a running batch: their images are those of the pipeline, and progress is reported per step."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from tests.support.numpy_model import SCHEDULERS, numpy_pipeline
from tests.support.waiting import wait_until

PROMPTS = ["a", "b", "c"]
MIXED = [
    Request("a", seed=1, num_inference_steps=5),
    Request("b", seed=2, num_inference_steps=9, guidance_scale=6.0, eta=0.3),
    Request(PROMPTS, seed=3, num_inference_steps=4, guidance_scale=3.0),
    Request(PROMPTS[:2], seed=[4, 5], num_inference_steps=7, eta=1.0, negative_prompt="q"),
    Request("c", seed=6, num_inference_steps=3, guidance_scale=6.0, height=16, width=12),
    Request("a", seed=7, num_inference_steps=6, guidance_scale=6.0, negative_prompt="r", eta=0.3),
    Request("b", seed=8, num_inference_steps=1),
    Request("c", seed=9, num_inference_steps=8, images_per_prompt=2, height=16, width=12),
    Request("x", seed=10, guidance_scale=6.0, guidance_every=2),
    Request("y", seed=11, guidance_scale=6.0, guidance_interval=(0.3, 0.7), eta=0.5),
    Request("z", seed=12, guidance_scale=6.0, num_inference_steps=9, cache_every=3),
    Request("x", seed=13, guidance_scale=6.0, num_inference_steps=8, cache_every=2, full_steps=1, guidance_every=3),
]


def alone(pipeline: LatentDiffusionPipeline, request: Request) -> np.ndarray:
    for step in pipeline.steps(request):
        latents = step.latents
    return np.stack([np.asarray(image) for image in pipeline.decode(latents)])


@pytest.mark.parametrize("request_", MIXED, ids=range(len(MIXED)))
def test_a_single_request_gives_exactly_the_pipelines_image(scheduler, pipeline, request_: Request) -> None:
    all_images = scheduler.submit(request_).result(60)
    assert np.array_equal(all_images.images, alone(pipeline, request_))
    assert all_images.images.std() > 5


@pytest.mark.parametrize("limits", [Limits(), Limits(max_rows=8), Limits(max_rows=32, row_buckets=(4, 16, 32))])
def test_batched_requests_give_the_pipelines_images(gated, pipeline, limits: Limits) -> None:
    """One request is submitted before each UNet call, so that they join at different steps."""
    requests = MIXED * 2
    scheduler, gate = gated(limits)
    jobs = []
    for request in requests:
        jobs.append(scheduler.submit(request))
        gate.wait_for_call()
        gate.let_through()
    gate.open()
    batched = [job.result(120).images for job in jobs]
    assert wait_until(lambda: scheduler.snapshot().running == 0)
    snapshot = scheduler.snapshot()
    expected = [alone(pipeline, request) for request in MIXED] * 2
    for one, other in zip(batched, expected, strict=True):
        assert one.shape == other.shape and one.dtype == np.uint8
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert snapshot.outcomes["done"] == len(requests) and snapshot.waiting == snapshot.running == 0
    assert snapshot.steps < sum(request.num_inference_steps or 6 for request in requests)  # they did share calls
    assert max(gate.rows) > max(len(np.atleast_1d(request.prompts)) * 2 for request in MIXED)
    assert set(snapshot.seconds) == {"encode", "unet", "noise", "step", "decode"}


def test_requests_that_start_together_give_exactly_the_images_of_one_request_for_both(gated, pipeline) -> None:
    """Requests that start together make the calls that one request of both prompts makes."""
    scheduler, gate = gated(max_rows=16)
    first = scheduler.submit(Request("c", seed=0, num_inference_steps=1))
    gate.wait_for_call()
    pair = [
        scheduler.submit(Request(p, seed=s, num_inference_steps=6, eta=0.5))
        for p, s in zip(PROMPTS[:2], (3, 4), strict=True)
    ]
    gate.open()
    batched = np.concatenate([job.result(60).images for job in pair])
    assert first.result(60) and gate.rows == [1] + [2] * 6
    together = Request(PROMPTS[:2], seed=[3, 4], num_inference_steps=6, eta=0.5)
    for step in pipeline.steps(together):
        latents = step.latents
    expected = [np.asarray(pipeline.decode(part)[0]) for part in (latents[:1], latents[1:])]
    assert np.array_equal(batched, np.stack(expected))


def test_requests_join_at_any_step_and_leave_when_done(gated, pipeline) -> None:
    scheduler, gate = gated(max_rows=8)
    long = scheduler.submit(Request("a", seed=0, num_inference_steps=10))
    gate.wait_for_call()
    gate.advance(3)
    short = scheduler.submit(Request("b", seed=0, num_inference_steps=2, guidance_scale=6.0))
    gate.advance(2)
    assert gate.rows == [1, 1, 1, 1, 3, 3]
    table = pipeline.denoiser.embed(np.array([500, 400, 0]))["time_embedding"]
    for call, rows in ((4, [0, 0, 0]), (5, [1, 2, 2])):
        assert np.array_equal(gate.feeds[call]["time_embedding"], table[rows])
    gate.advance()
    assert short.result(20).images.shape == (1, 12, 12, 3) and not long.future.done()
    assert gate.rows[-1] == 1
    gate.open()
    long.result(20)


def test_different_sizes_alternate(gated) -> None:
    scheduler, gate = gated(max_rows=4, max_sizes=2)
    sizes = [(12, 12), (16, 12), (12, 16)]
    jobs = [scheduler.submit(Request("a", seed=0, num_inference_steps=3, height=h, width=w)) for h, w in sizes]
    gate.open()
    for job, (height, width) in zip(jobs, sizes, strict=True):
        assert job.result(60).images.shape == (1, height, width, 3)
    assert gate.rows == [1] * 9  # no two sizes in one call


def test_progress_and_previews_are_reported_per_step(scheduler, pipeline) -> None:
    reported = []
    request = Request("a", seed=1, num_inference_steps=10, guidance_scale=6.0)
    all_images = scheduler.submit(request, on_progress=reported.append, preview_every=4).result(60)
    assert [(p.index, p.total) for p in reported] == [(index, 10) for index in range(10)]
    assert [p.index for p in reported if p.preview is not None] == [3, 7]
    apart = [np.abs(reported[index].preview.astype(int) - all_images.images).mean() for index in (3, 7)]
    assert reported[3].preview.shape == all_images.images.shape and apart[1] < apart[0] < 60
    assert np.array_equal(all_images.images, alone(pipeline, request))


def test_a_failing_or_blocking_callback_delays_no_step(scheduler) -> None:
    released = threading.Event()

    def block(_) -> None:
        released.wait(60)

    def fail(_) -> None:
        raise ValueError("a caller's own fault")

    failing = scheduler.submit(Request("a", seed=0, num_inference_steps=3), on_progress=fail)
    failing.result(60)
    scheduler.submit(Request("a", seed=0, num_inference_steps=3), on_progress=block)
    scheduler.submit(Request("a", seed=0, num_inference_steps=3))
    try:
        assert wait_until(lambda: scheduler.snapshot().outcomes["done"] == 3)
    finally:
        released.set()


@pytest.mark.parametrize("method", [*SCHEDULERS])
def test_a_model_without_conditioning_is_served(tmp_path: Path, method: str) -> None:
    unconditional = numpy_pipeline(tmp_path, text=False, scheduler=SCHEDULERS[method], image_channels=1)
    with BatchScheduler(unconditional) as scheduler:
        jobs = [scheduler.submit(Request(count=count, seed=count)) for count in (3, 1)]
        for job, count in zip(jobs, (3, 1), strict=True):
            images = job.result(60).images
            assert images.shape == (count, 12, 12, 1)
            for step in unconditional.steps(Request(count=count, seed=count)):
                latents = step.latents
            assert np.array_equal(images[..., 0], np.stack([np.asarray(i) for i in unconditional.decode(latents)]))


def test_options_that_are_left_out_are_the_models(scheduler, pipeline) -> None:
    defaults = pipeline.model.defaults
    explicit = Request(
        "a",
        seed=1,
        num_inference_steps=defaults.num_inference_steps,
        eta=defaults.eta,
        guidance_scale=defaults.guidance_scale,
    )
    results = [scheduler.submit(request).result(60) for request in (Request("a", seed=1), explicit)]
    assert np.array_equal(results[0].images, results[1].images) and results[0].seeds == (1,)
    assert all(result.seconds_waiting >= 0 and result.seconds_running > 0 for result in results)
