"""The request queue of the batch scheduler: order, a full queue, cancelled and expired requests."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ldm_runtime import Request
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import CancelledError, DeadlineError, QueueFullError
from tests.support.step_gate import PROMPTS, StepGate
from tests.support.waiting import wait_until


def test_a_full_queue_refuses_until_a_place_is_free(gated) -> None:
    room, gate = gated(rows=1, queue=2)
    running = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=50))
    gate.wait_for_call()
    waiting = [room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1)) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1))
    waiting[0].cancel()
    third = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1))
    with pytest.raises(CancelledError):
        waiting[0].result(20)
    gate.open()
    for ticket in (running, waiting[1], third):
        ticket.result(60)
    outcomes = room.figures().outcomes
    assert (outcomes["done"], outcomes["refused"], outcomes["cancelled"]) == (3, 1, 1)


def test_a_cancelled_request_leaves_before_the_next_step(gated) -> None:
    room, gate = gated(rows=8)
    first, second, third = (
        room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=20, guidance_scale=scale))
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
    room, gate = gated(rows=1)
    running = room.submit(Request(PROMPTS[0], seed=0), seconds=0.2)
    gate.wait_for_call()
    waiting = room.submit(Request(PROMPTS[0], seed=0), seconds=0.2)
    assert wait_until(lambda: all(ticket.stopped(time.monotonic()) for ticket in (running, waiting)))
    gate.let_through()
    for ticket, place in ((running, "running"), (waiting, "waiting")):
        with pytest.raises(DeadlineError, match=f"still {place} after its 0.2 s"):
            ticket.result(20)
    assert gate.rows == [1] and room.figures().outcomes["overdue"] == 2


def order(room: BatchScheduler, gate: StepGate, priorities: list[int]) -> list[int]:
    """The order in which requests of these priorities end; all are submitted before the first of them runs."""
    first = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1))
    gate.wait_for_call()
    ended: list[int] = []
    for index, priority in enumerate(priorities):
        ticket = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1), priority=priority)
        ticket.future.add_done_callback(lambda _, index=index: ended.append(index))
    gate.open()
    first.result(20)
    assert wait_until(lambda: len(ended) == len(priorities))
    return ended


def test_the_order_is_first_come_first_served_within_a_priority(gated) -> None:
    assert order(*gated(rows=1), [2, 4, 2, 0, 1, 4, 0]) == [3, 6, 4, 0, 2, 1, 5]


def test_aging_lets_a_less_urgent_request_run_eventually(gated) -> None:
    """A priority level is worth ``patience`` seconds of waiting, which is close to zero here."""
    assert order(*gated(rows=1, patience=1e-9), [4, 0, 4, 0]) == [0, 1, 2, 3]


def test_small_requests_do_not_overtake_a_large_one(gated) -> None:
    room, gate = gated(rows=4)
    first = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2))
    gate.wait_for_call()
    second = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=4))
    large = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2, images_per_prompt=4))
    small = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1))
    gate.open()
    for ticket in (first, second, large, small):
        ticket.result(60)
    assert gate.rows == [1, 2, 1, 1, 1, 4, 4, 1]
