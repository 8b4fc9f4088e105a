"""Readiness of the batch scheduler when an engine fails or hangs, and closing it."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from ldm_runtime import Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import BackendError, CancelledError, QueueFullError, SpecError
from tests.support.step_gate import PROMPTS
from tests.support.waiting import wait_until


def own_threads() -> set[threading.Thread]:
    """The threads of all batch schedulers; the thread pools of engines come and go on their own."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("ldm-")}


def test_a_failing_engine_makes_it_unready_until_an_image_can_be_generated(room, pipeline, monkeypatch) -> None:
    broken = threading.Event()
    run = pipeline.backends["unet"].run

    def sometimes(feed):
        if broken.is_set():
            raise BackendError("unet: out of memory")
        return run(feed)

    monkeypatch.setattr(pipeline.backends["unet"], "run", sometimes)
    assert room.ready
    broken.set()
    with pytest.raises(BackendError, match="out of memory"):
        room.submit(Request(PROMPTS[0], seed=0)).result(20)
    assert wait_until(lambda: not room.ready)
    with pytest.raises(QueueFullError, match="no picture can be made now"):
        room.submit(Request(PROMPTS[0], seed=0))
    broken.clear()
    assert wait_until(lambda: room.ready)
    room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2)).result(20)


def test_the_idle_self_test_detects_a_failing_engine(pipeline, monkeypatch) -> None:
    def fail(_):
        raise BackendError("decoder: the GPU is lost")

    with BatchScheduler(pipeline, Limits(idle=0.05)) as room:
        assert room.ready
        monkeypatch.setattr(pipeline.backends["decoder"], "run", fail)
        assert wait_until(lambda: not room.ready)
        monkeypatch.undo()
        assert wait_until(lambda: room.ready)


def test_an_image_with_nan_fails_alone_and_not_those_decoded_with_it(gated, pipeline, monkeypatch) -> None:
    room, gate = gated()
    held = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2))
    gate.wait_for_call()
    tickets = [room.submit(Request(PROMPTS[number], seed=number, num_inference_steps=1)) for number in range(3)]
    decode, batches, bad = pipeline.backends["decoder"].run, [], []

    def spoilt(feed):
        latents, image = feed["latents"], decode(feed)["image"].copy()
        batches.append(len(latents))
        bad[:] = bad or [latents[1].copy()]
        image[[np.array_equal(one, bad[0]) for one in latents]] = np.nan
        return {"image": image}

    monkeypatch.setattr(pipeline.backends["decoder"], "run", spoilt)
    gate.open()
    outcomes = [ticket.future.exception(20) for ticket in (held, *tickets)]
    assert [isinstance(outcome, SpecError) for outcome in outcomes] == [False, True, False, False]
    assert [ticket.result().images.shape for ticket in (held, *tickets[1:])] == [(1, 64, 64, 3)] * 3
    assert batches == [4, 1, 1, 1, 1]
    assert room.ready


def test_without_a_first_self_test_it_becomes_ready_later(pipeline) -> None:
    with BatchScheduler(pipeline, prove=False) as room:
        assert wait_until(lambda: room.ready)


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
    room, gate = gated(stall=0.1)
    ticket = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2))
    assert wait_until(lambda: not room.ready)
    gate.open()
    ticket.result(20)
    assert wait_until(lambda: room.ready)


def test_closing_with_a_timeout_finishes_submitted_requests(gated, pipeline) -> None:
    room, gate = gated(rows=1)
    short = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2))
    gate.wait_for_call()
    waiting = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3))
    closing = threading.Thread(target=room.close, kwargs={"seconds": 30})
    closing.start()
    assert wait_until(lambda: not room.ready)
    with pytest.raises(CancelledError, match="closing"):
        room.submit(Request(PROMPTS[0]))
    gate.open()
    closing.join(30)
    assert short.result(1) and waiting.result(1) and not closing.is_alive()


def test_closing_at_once_cancels_all_requests(gated) -> None:
    before = set(threading.enumerate())
    room, gate = gated(rows=1)
    tickets = [room.submit(Request(PROMPTS[0], seed=0)) for _ in range(3)]
    gate.wait_for_call()
    gate.open()
    room.close()
    for ticket in tickets:
        with pytest.raises(CancelledError, match="closed before"):
            ticket.result(1)
    assert not own_threads() - before
    room.close()
