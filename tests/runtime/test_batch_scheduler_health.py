"""Readiness of the batch scheduler when an engine fails or hangs, and closing it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ldm_runtime import Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import BackendError, CancelledError, QueueFullError, SpecError
from tests.support.waiting import wait_until


def own_threads() -> set[threading.Thread]:
    """The threads of all batch schedulers; the thread pools of engines come and go on their own."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("ldm-")}


def test_a_failing_engine_makes_it_unready_until_an_image_can_be_generated(scheduler, pipeline, monkeypatch) -> None:
    broken = threading.Event()
    run = pipeline.backends["unet"].run

    def sometimes(feed):
        if broken.is_set():
            raise BackendError("unet: out of memory")
        return run(feed)

    monkeypatch.setattr(pipeline.backends["unet"], "run", sometimes)
    assert scheduler.ready
    broken.set()
    with pytest.raises(BackendError, match="out of memory"):
        scheduler.submit(Request("a", seed=0)).result(20)
    assert wait_until(lambda: not scheduler.ready)
    with pytest.raises(QueueFullError, match="does not respond; try again later"):
        scheduler.submit(Request("a", seed=0))
    broken.clear()
    assert wait_until(lambda: scheduler.ready)
    scheduler.submit(Request("a", seed=0, num_inference_steps=2)).result(20)


def test_the_idle_self_test_detects_a_failing_engine(pipeline, monkeypatch) -> None:
    def fail(_):
        raise BackendError("decoder: the GPU is lost")

    with BatchScheduler(pipeline, Limits(self_test_after=0.05)) as scheduler:
        assert scheduler.ready
        monkeypatch.setattr(pipeline.backends["decoder"], "run", fail)
        assert wait_until(lambda: not scheduler.ready)
        monkeypatch.undo()
        assert wait_until(lambda: scheduler.ready)


def test_an_image_with_nan_fails_alone_and_not_those_decoded_with_it(gated, pipeline, monkeypatch) -> None:
    scheduler, gate = gated()
    healthy = scheduler.submit(Request("a", seed=0, num_inference_steps=2))
    gate.wait_for_call()
    jobs = [scheduler.submit(Request("abc"[number], seed=number, num_inference_steps=1)) for number in range(3)]
    decode, batches, bad = pipeline.backends["decoder"].run, [], []

    def spoilt(feed):
        latents, image = feed["latents"], decode(feed)["image"].copy()
        batches.append(len(latents))
        bad[:] = bad or [latents[1].copy()]
        image[[np.array_equal(one, bad[0]) for one in latents]] = np.nan
        return {"image": image}

    monkeypatch.setattr(pipeline.backends["decoder"], "run", spoilt)
    gate.open()
    outcomes = [job.future.exception(20) for job in (healthy, *jobs)]
    assert [isinstance(outcome, SpecError) for outcome in outcomes] == [False, True, False, False]
    assert [job.result().images.shape for job in (healthy, *jobs[1:])] == [(1, 12, 12, 3)] * 3
    assert batches == [4, 1, 1, 1, 1]
    assert scheduler.ready


def test_latents_that_are_far_too_large_fail_their_request_alone(scheduler, pipeline, monkeypatch) -> None:
    run = pipeline.backends["unet"].run
    monkeypatch.setattr(
        pipeline.backends["unet"], "run", lambda feed: {"noise_pred": run(feed)["noise_pred"] * np.float32(1e12)}
    )
    with pytest.raises(SpecError, match="latents: got up to"):
        scheduler.submit(Request("a", seed=0, num_inference_steps=1)).result(20)
    monkeypatch.undo()
    assert scheduler.ready and scheduler.submit(Request("a", seed=0, num_inference_steps=1)).result(20)


def test_without_a_first_self_test_it_becomes_ready_later(pipeline) -> None:
    with BatchScheduler(pipeline, warm_up=False) as scheduler:
        assert wait_until(lambda: scheduler.ready)


def test_it_does_not_start_when_no_image_can_be_generated(pipeline, monkeypatch) -> None:
    decode = pipeline.backends["decoder"].run
    monkeypatch.setattr(
        pipeline.backends["decoder"], "run", lambda feed: {"image": decode(feed)["image"] * np.float32(np.nan)}
    )
    before = set(threading.enumerate())
    with pytest.raises(SpecError, match="NaN"):
        BatchScheduler(pipeline)
    assert wait_until(lambda: not own_threads() - before)


def test_a_hanging_engine_makes_it_unready(gated) -> None:
    scheduler, gate = gated(stall_timeout=0.1)
    job = scheduler.submit(Request("a", seed=0, num_inference_steps=2))
    assert wait_until(lambda: not scheduler.ready)
    gate.open()
    job.result(20)
    assert wait_until(lambda: scheduler.ready)


def test_closing_with_a_timeout_finishes_submitted_requests(gated, pipeline) -> None:
    scheduler, gate = gated(max_rows=1)
    short = scheduler.submit(Request("a", seed=0, num_inference_steps=2))
    gate.wait_for_call()
    waiting = scheduler.submit(Request("a", seed=0, num_inference_steps=3))
    closing = threading.Thread(target=scheduler.close, kwargs={"timeout": 30})
    closing.start()
    assert wait_until(lambda: not scheduler.ready)
    with pytest.raises(CancelledError, match="closing"):
        scheduler.submit(Request("a"))
    gate.open()
    closing.join(30)
    assert short.result(1) and waiting.result(1) and not closing.is_alive()


def test_closing_at_once_cancels_all_requests(gated) -> None:
    before = set(threading.enumerate())
    scheduler, gate = gated(max_rows=1)
    jobs = [scheduler.submit(Request("a", seed=0, num_inference_steps=1000)) for _ in range(3)]
    gate.wait_for_call()
    gate.open()
    scheduler.close()
    for job in jobs:
        with pytest.raises(CancelledError, match="closed before"):
            job.result(1)
    assert not own_threads() - before
    scheduler.close()
