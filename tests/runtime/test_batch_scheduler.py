"""Requests that share a running batch: their images are those of the pipeline, and progress is reported per step."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.limits import Limits
from tests.support.step_gate import PROMPTS
from tests.support.waiting import wait_until

MIXED = [
    Request(PROMPTS[0], seed=1, num_inference_steps=5),
    Request(PROMPTS[1], seed=2, num_inference_steps=9, guidance_scale=6.0, eta=0.3),
    Request(PROMPTS, seed=3, num_inference_steps=4, guidance_scale=3.0),
    Request(PROMPTS[:2], seed=[4, 5], num_inference_steps=7, eta=1.0, negative_prompt="a circle"),
    Request(PROMPTS[2], seed=6, num_inference_steps=3, guidance_scale=6.0, height=96, width=64),
    Request(PROMPTS[0], seed=7, num_inference_steps=6, guidance_scale=6.0, negative_prompt="red", eta=0.3),
    Request(PROMPTS[1], seed=8, num_inference_steps=1),
    Request(PROMPTS[2], seed=9, num_inference_steps=8, images_per_prompt=2, height=96, width=64),
]


def alone(pipeline: LatentDiffusionPipeline, request: Request) -> np.ndarray:
    for step in pipeline.steps(request):
        latents = step.latents
    return np.stack([np.asarray(image) for image in pipeline.decode(latents)])


@pytest.mark.parametrize("request_", MIXED, ids=range(len(MIXED)))
def test_a_single_request_gives_exactly_the_pipelines_image(room, pipeline, request_: Request) -> None:
    pictures = room.submit(request_).result(60)
    assert np.array_equal(pictures.images, alone(pipeline, request_))
    assert pictures.images.std() > 5


@pytest.mark.parametrize("limits", [Limits(), Limits(rows=8), Limits(rows=32, call_rows=(4, 16, 32))])
def test_batched_requests_give_the_pipelines_images(gated, pipeline, limits: Limits) -> None:
    """One request is submitted before each UNet call, so that they join at different steps."""
    requests = MIXED * 2
    room, gate = gated(limits)
    tickets = []
    for request in requests:
        tickets.append(room.submit(request))
        gate.wait_for_call()
        gate.let_through()
    gate.open()
    found = [ticket.result(120).images for ticket in tickets]
    assert wait_until(lambda: room.figures().running == 0)
    figures = room.figures()
    expected = [alone(pipeline, request) for request in MIXED] * 2
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == np.uint8
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert figures.outcomes["done"] == len(requests) and figures.waiting == figures.running == 0
    assert figures.steps < sum(request.num_inference_steps for request in requests)  # they did share calls
    assert max(gate.rows) > max(len(np.atleast_1d(request.prompts)) * 2 for request in MIXED)
    assert set(figures.seconds) == {"encode", "unet", "noise", "step", "decode"}


def test_requests_that_start_together_give_exactly_the_images_of_one_request_for_both(gated, pipeline) -> None:
    """Requests that start together make the calls that one request of both prompts makes."""
    room, gate = gated(rows=16)
    first = room.submit(Request(PROMPTS[2], seed=0, num_inference_steps=1))
    gate.wait_for_call()
    pair = [
        room.submit(Request(p, seed=s, num_inference_steps=6, eta=0.5))
        for p, s in zip(PROMPTS[:2], (3, 4), strict=True)
    ]
    gate.open()
    found = np.concatenate([ticket.result(60).images for ticket in pair])
    assert first.result(60) and gate.rows == [1] + [2] * 6
    together = Request(PROMPTS[:2], seed=[3, 4], num_inference_steps=6, eta=0.5)
    for step in pipeline.steps(together):
        latents = step.latents
    expected = [np.asarray(pipeline.decode(part)[0]) for part in (latents[:1], latents[1:])]
    assert np.array_equal(found, np.stack(expected))


def test_requests_join_at_any_step_and_leave_when_done(gated) -> None:
    room, gate = gated(rows=8)
    long = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=10))
    gate.wait_for_call()
    gate.advance(3)
    short = room.submit(Request(PROMPTS[1], seed=0, num_inference_steps=2, guidance_scale=6.0))
    gate.advance(2)
    assert gate.rows == [1, 1, 1, 1, 3, 3]
    assert gate.times[4] == [500, 500, 500] and gate.times[5] == [400, 0, 0]
    gate.advance()
    assert short.result(20).images.shape == (1, 64, 64, 3) and not long.future.done()
    assert gate.rows[-1] == 1
    gate.open()
    long.result(20)


def test_different_sizes_alternate(gated) -> None:
    room, gate = gated(rows=4, heights_and_widths=2)
    sizes = [(64, 64), (96, 64), (64, 96)]
    tickets = [room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3, height=h, width=w)) for h, w in sizes]
    gate.open()
    for ticket, (height, width) in zip(tickets, sizes, strict=True):
        assert ticket.result(60).images.shape == (1, height, width, 3)
    assert gate.rows == [1] * 9  # no two sizes in one call


def test_progress_and_previews_are_reported_per_step(room, pipeline) -> None:
    told = []
    request = Request(PROMPTS[0], seed=1, num_inference_steps=10, guidance_scale=6.0)
    pictures = room.submit(request, progress=told.append, preview_every=4).result(60)
    assert [(p.index, p.total) for p in told] == [(index, 10) for index in range(10)]
    assert [p.index for p in told if p.preview is not None] == [3, 7]
    apart = [np.abs(told[index].preview.astype(int) - pictures.images).mean() for index in (3, 7)]
    assert told[3].preview.shape == pictures.images.shape and apart[1] < apart[0] < 60
    assert np.array_equal(pictures.images, alone(pipeline, request))


def test_a_failing_or_blocking_callback_delays_no_step(room) -> None:
    released = threading.Event()

    def block(_) -> None:
        released.wait(60)

    def fail(_) -> None:
        raise ValueError("a caller's own fault")

    failing = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3), progress=fail)
    failing.result(60)
    room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3), progress=block)
    room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3))
    try:
        assert wait_until(lambda: room.figures().outcomes["done"] == 3)
    finally:
        released.set()
