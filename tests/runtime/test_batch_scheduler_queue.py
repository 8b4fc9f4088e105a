"""The request queue of the batch scheduler: order, a full queue, cancelled and expired requests."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ldm_runtime import Request
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import CancelledError, DeadlineError, QueueFullError
from tests.support.step_gate import StepGate
from tests.support.waiting import wait_until


def test_a_full_queue_refuses_until_a_place_is_free(gated) -> None:
    scheduler, gate = gated(max_rows=1, max_queue=2)
    running = scheduler.submit(Request("a", seed=0, num_inference_steps=50))
    gate.wait_for_call()
    waiting = [scheduler.submit(Request("a", seed=0, num_inference_steps=1)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        scheduler.submit(Request("a", seed=0, num_inference_steps=1))
    waiting[0].cancel()
    third = scheduler.submit(Request("a", seed=0, num_inference_steps=1))
    with pytest.raises(CancelledError):
        waiting[0].result(20)
    gate.open()
    for job in (running, waiting[1], third):
        job.result(60)
    outcomes = scheduler.snapshot().outcomes
    assert (outcomes["done"], outcomes["refused"], outcomes["cancelled"]) == (3, 1, 1)


def test_a_cancelled_request_leaves_before_the_next_step(gated) -> None:
    scheduler, gate = gated(max_rows=8)
    first, second, third = (
        scheduler.submit(Request("a", seed=0, num_inference_steps=20, guidance_scale=scale))
        for scale in (1.0, 2.0, 1.0)
    )
    gate.wait_for_call()
    gate.advance()
    assert gate.rows[-1] == 4
    second.cancel()
    gate.advance()
    assert gate.rows[-1] == 2
    with pytest.raises(CancelledError, match="by its caller"):
        second.result(20)
    gate.open()
    assert np.array_equal(first.result(60).images, third.result(60).images)


def test_a_deadline_ends_running_and_waiting_requests(gated) -> None:
    scheduler, gate = gated(max_rows=1)
    running = scheduler.submit(Request("a", seed=0), timeout=600)
    gate.wait_for_call()
    waiting = scheduler.submit(Request("a", seed=0), timeout=600)
    for job in (running, waiting):
        assert job.stop_reason(time.monotonic()) is None
        job.submitted, job.deadline = job.submitted - 600, job.deadline - 600  # as if ten minutes had passed
    gate.let_through()
    for job, place in ((running, "running"), (waiting, "waiting")):
        with pytest.raises(DeadlineError, match=f"still {place} after its 600 s"):
            job.result(20)
    assert gate.rows == [1] and scheduler.snapshot().outcomes["expired"] == 2


def order(scheduler: BatchScheduler, gate: StepGate, priorities: list[int]) -> list[int]:
    """The order in which requests of these priorities end; all are submitted before the first of them runs."""
    first = scheduler.submit(Request("a", seed=0, num_inference_steps=1))
    gate.wait_for_call()
    ended: list[int] = []
    for index, priority in enumerate(priorities):
        job = scheduler.submit(Request("a", seed=0, num_inference_steps=1), priority=priority)
        job.future.add_done_callback(lambda _, index=index: ended.append(index))
    gate.open()
    first.result(20)
    assert wait_until(lambda: len(ended) == len(priorities))
    return ended


def test_the_order_is_first_come_first_served_within_a_priority(gated) -> None:
    assert order(*gated(max_rows=1), [2, 4, 2, 0, 1, 4, 0]) == [3, 6, 4, 0, 2, 1, 5]


def test_aging_lets_a_less_urgent_request_run_eventually(gated) -> None:
    """A priority level is worth ``aging_seconds`` seconds of waiting, which is close to zero here."""
    assert order(*gated(max_rows=1, aging_seconds=1e-9), [4, 0, 4, 0]) == [0, 1, 2, 3]


def test_small_requests_do_not_overtake_a_large_one(gated) -> None:
    scheduler, gate = gated(max_rows=4)
    first = scheduler.submit(Request("a", seed=0, num_inference_steps=2))
    gate.wait_for_call()
    second = scheduler.submit(Request("a", seed=0, num_inference_steps=4))
    large = scheduler.submit(Request("a", seed=0, num_inference_steps=2, images_per_prompt=4))
    small = scheduler.submit(Request("a", seed=0, num_inference_steps=1))
    gate.open()
    for job in (first, second, large, small):
        job.result(60)
    assert gate.rows == [1, 2, 1, 1, 1, 4, 4, 1]
