"""Requests that share a running batch: the pictures they have alone, in fair order, and none lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.engine_room import EngineRoom
from ldm_runtime.errors import BackendError, CancelledError, DeadlineError, QueueFullError, SpecError
from ldm_runtime.limits import Limits

PROMPTS = [
    "a large red circle in the center on a white background",
    "a small blue triangle left of a large yellow cross on a gray background",
    "a small green square above a large purple square on a black background",
]
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


@pytest.fixture(scope="module")
def pipeline(shapes_bundle: Path) -> Iterator[LatentDiffusionPipeline]:
    with LatentDiffusionPipeline.from_bundle(shapes_bundle, backend="onnxruntime", precision="fp32") as loaded:
        yield loaded


@pytest.fixture
def room(pipeline: LatentDiffusionPipeline) -> Iterator[EngineRoom]:
    with EngineRoom(pipeline) as open_room:
        yield open_room


def alone(pipeline: LatentDiffusionPipeline, request: Request) -> np.ndarray:
    for step in pipeline.steps(request):
        latents = step.latents
    return np.stack([np.asarray(image) for image in pipeline.decode(latents)])


def settled(check: Callable[[], bool], seconds: float = 20) -> bool:
    """True as soon as ``check`` is, False where it is not in time."""
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


class Gate:
    """The UNet's ``run``, which waits at each call until it is let on, and records what it was given."""

    def __init__(self, run):
        self.run, self.rows, self.times = run, [], []
        self.arrived, self.let_on = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, feed):
        self.rows.append(len(feed["sample"]))
        self.times.append(feed["timestep"].tolist())
        self.arrived.release()
        assert self.let_on.acquire(timeout=60)
        return self.run(feed)

    def on(self, calls: int = 1) -> None:
        """Let calls through, and wait until the next one stands at the gate."""
        for _ in range(calls):
            self.let_on.release()
            assert self.arrived.acquire(timeout=20)

    def open(self) -> None:
        for _ in range(10_000):
            self.let_on.release()


@pytest.fixture
def gated(pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple]]:
    """Makes a room whose UNet calls stand at a gate, with one request of many steps running already."""
    rooms = []

    def make(**limits) -> tuple[EngineRoom, Gate]:
        gate = Gate(pipeline.backends["unet"].run)
        room = EngineRoom(pipeline, Limits(**limits))
        monkeypatch.setattr(pipeline.backends["unet"], "run", gate)
        rooms.append((room, gate))
        return room, gate

    yield make
    for room, gate in rooms:
        gate.open()
        room.close()


@pytest.mark.parametrize("request_", MIXED, ids=range(len(MIXED)))
def test_alone_in_the_room_is_bit_for_bit_as_without_it(room, pipeline, request_: Request) -> None:
    pictures = room.submit(request_).result(60)
    assert np.array_equal(pictures.images, alone(pipeline, request_))
    assert pictures.images.std() > 5


@pytest.mark.parametrize("limits", [Limits(), Limits(rows=8), Limits(rows=32, call_rows=(4, 16, 32))])
def test_together_they_are_what_they_are_alone(pipeline, limits: Limits) -> None:
    requests = [replace(request, seed=request.seed) for request in MIXED * 2]
    with EngineRoom(pipeline, limits) as room:
        tickets = []
        for request in requests:
            tickets.append(room.submit(request))
            time.sleep(0.003)  # so that they join at different steps
        found = [ticket.result(120).images for ticket in tickets]
        figures = room.figures()
    expected = [alone(pipeline, request) for request in MIXED] * 2
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == np.uint8
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert figures.outcomes["done"] == len(requests) and figures.waiting == figures.running == 0
    assert figures.steps < sum(request.num_inference_steps for request in requests)  # they did share calls
    assert all(seconds > 0 for seconds in figures.seconds.values())


def test_the_same_rows_at_the_same_place_are_bit_for_bit_those_of_a_batch(gated, pipeline) -> None:
    """Requests that start together make the calls that one request of both prompts makes."""
    room, gate = gated(rows=16)
    first = room.submit(Request(PROMPTS[2], seed=0, num_inference_steps=1))
    assert gate.arrived.acquire(timeout=20)
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


def test_they_join_at_any_step_and_leave_when_done(gated) -> None:
    room, gate = gated(rows=8)
    long = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=10))
    assert gate.arrived.acquire(timeout=20)
    gate.on(3)
    short = room.submit(Request(PROMPTS[1], seed=0, num_inference_steps=2, guidance_scale=6.0))
    gate.on(2)
    assert gate.rows == [1, 1, 1, 1, 3, 3]
    assert gate.times[4] == [500, 500, 500] and gate.times[5] == [400, 0, 0]
    gate.on()
    assert short.result(20).images.shape == (1, 64, 64, 3) and not long.future.done()
    assert gate.rows[-1] == 1
    gate.open()
    long.result(20)


def test_a_full_queue_refuses_and_a_free_place_takes_again(gated) -> None:
    room, gate = gated(rows=1, queue=2)
    running = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=50))
    assert gate.arrived.acquire(timeout=20)
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
    assert gate.arrived.acquire(timeout=20)
    gate.on()
    assert gate.rows[-1] == 4
    second.cancel()
    gate.on()
    assert gate.rows[-1] == 2
    with pytest.raises(CancelledError, match="by its caller"):
        second.result(20)
    gate.open()
    assert np.array_equal(first.result(60).images, third.result(60).images)


def test_a_deadline_ends_a_running_and_a_waiting_request(gated) -> None:
    room, gate = gated(rows=1)
    running = room.submit(Request(PROMPTS[0], seed=0), seconds=0.2)
    assert gate.arrived.acquire(timeout=20)
    waiting = room.submit(Request(PROMPTS[0], seed=0), seconds=0.2)
    time.sleep(0.3)
    gate.let_on.release()
    for ticket, place in ((running, "running"), (waiting, "waiting")):
        with pytest.raises(DeadlineError, match=f"still {place} after its 0.2 s"):
            ticket.result(20)
    assert gate.rows == [1] and room.figures().outcomes["overdue"] == 2


def order(room: EngineRoom, gate: Gate, priorities: list[int]) -> list[int]:
    """In which order requests of these priorities end, one running at a time; all come before any runs."""
    first = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1))
    assert gate.arrived.acquire(timeout=20)
    ended: list[int] = []
    for index, priority in enumerate(priorities):
        ticket = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1), priority=priority)
        ticket.future.add_done_callback(lambda _, index=index: ended.append(index))
    gate.open()
    first.result(20)
    assert settled(lambda: len(ended) == len(priorities))
    return ended


def test_the_order_is_first_come_first_served_within_a_priority(gated) -> None:
    assert order(*gated(rows=1), [2, 4, 2, 0, 1, 4, 0]) == [3, 6, 4, 0, 2, 1, 5]


def test_a_less_urgent_request_is_not_overtaken_for_ever(gated) -> None:
    """Each step of priority is worth ``patience`` seconds of arrival, here none to speak of."""
    assert order(*gated(rows=1, patience=1e-9), [4, 0, 4, 0]) == [0, 1, 2, 3]


def test_a_large_request_is_not_passed_by_small_ones_behind_it(gated) -> None:
    room, gate = gated(rows=4)
    first = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2))
    assert gate.arrived.acquire(timeout=20)
    second = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=4))
    large = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2, images_per_prompt=4))
    small = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=1))
    gate.open()
    for ticket in (first, second, large, small):
        ticket.result(60)
    assert gate.rows == [1, 2, 1, 1, 1, 4, 4, 1]


def test_two_sizes_take_turns(gated) -> None:
    room, gate = gated(rows=4, heights_and_widths=2)
    sizes = [(64, 64), (96, 64), (64, 96)]
    tickets = [room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3, height=h, width=w)) for h, w in sizes]
    gate.open()
    for ticket, (height, width) in zip(tickets, sizes, strict=True):
        assert ticket.result(60).images.shape == (1, height, width, 3)
    assert gate.rows == [1] * 9  # no two sizes in one call


def test_progress_and_previews_are_told_step_by_step(room, pipeline) -> None:
    told = []
    request = Request(PROMPTS[0], seed=1, num_inference_steps=10, guidance_scale=6.0)
    pictures = room.submit(request, progress=told.append, preview_every=4).result(60)
    assert [(p.index, p.total) for p in told] == [(index, 10) for index in range(10)]
    assert [p.index for p in told if p.preview is not None] == [3, 7]
    apart = [np.abs(told[index].preview.astype(int) - pictures.images).mean() for index in (3, 7)]
    assert told[3].preview.shape == pictures.images.shape and apart[1] < apart[0] < 60
    assert np.array_equal(pictures.images, alone(pipeline, request))


def test_a_callback_that_fails_or_hangs_delays_no_step(room) -> None:
    held = threading.Event()

    def hang(_) -> None:
        held.wait(60)

    def fail(_) -> None:
        raise ValueError("a caller's own fault")

    failing = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3), progress=fail)
    failing.result(60)
    room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3), progress=hang)
    room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3))
    assert settled(lambda: room.figures().outcomes["done"] == 3)
    held.set()


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(""), "prompts: got an empty prompt"),
        (Request("a", num_inference_steps=0), "steps: got 0"),
        (Request("a", eta=float("nan")), "eta: got nan"),
        (Request("a", guidance_scale=float("inf")), "guidance_scale"),
        (Request("a", height=65), "height: got 65, expected a multiple of 8"),
        (Request("a", seed=2**64), "seed: got"),
        (Request("a", images_per_prompt=32, guidance_scale=2.0), "need 64 rows of a UNet call"),
        (Request("\ud800"), "lone surrogate"),
        (Request("a" * 10_001), "10001 characters"),
    ],
)
def test_bad_requests_are_refused_alone(room, request_: Request, said: str) -> None:
    beside = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=5))
    with pytest.raises(SpecError, match=said):
        room.submit(request_).result(20)
    beside.result(20)
    assert room.ready


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"priority": 5}, "priority: got 5"),
        ({"seconds": 0}, "seconds: got 0"),
        ({"preview_every": -1}, "preview_every"),
    ],
)
def test_bad_options_are_refused(room, options: dict, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        room.submit(Request(PROMPTS[0]), **options)


def test_an_engine_that_fails_makes_it_unready_until_a_picture_can_be_made(room, pipeline, monkeypatch) -> None:
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
    assert settled(lambda: not room.ready)
    with pytest.raises(QueueFullError, match="no picture can be made now"):
        room.submit(Request(PROMPTS[0], seed=0))
    broken.clear()
    assert settled(lambda: room.ready)
    room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2)).result(20)


def test_an_engine_that_fails_without_work_makes_it_unready_too(pipeline, monkeypatch) -> None:
    def fail(_):
        raise BackendError("decoder: the GPU is lost")

    with EngineRoom(pipeline, Limits(idle=0.05)) as room:
        assert room.ready
        monkeypatch.setattr(pipeline.backends["decoder"], "run", fail)
        assert settled(lambda: not room.ready)
        monkeypatch.undo()
        assert settled(lambda: room.ready)


def test_a_room_that_is_not_proven_at_once_is_ready_soon(pipeline) -> None:
    with EngineRoom(pipeline, prove=False) as room:
        assert settled(lambda: room.ready)


def test_a_room_that_cannot_make_a_picture_does_not_open(pipeline, monkeypatch) -> None:
    decode = pipeline.backends["decoder"].run
    monkeypatch.setattr(
        pipeline.backends["decoder"], "run", lambda feed: {"image": decode(feed)["image"] * np.float32(np.nan)}
    )
    before = threading.active_count()
    with pytest.raises(SpecError, match="NaN"):
        EngineRoom(pipeline)
    assert settled(lambda: threading.active_count() == before)


def test_an_engine_that_hangs_makes_it_unready(gated) -> None:
    room, gate = gated(stall=0.1)
    ticket = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2))
    assert settled(lambda: not room.ready)
    gate.open()
    ticket.result(20)
    assert settled(lambda: room.ready)


def test_closing_finishes_what_it_has_time_for_and_cancels_the_rest(gated, pipeline) -> None:
    room, gate = gated(rows=1)
    short = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=2))
    assert gate.arrived.acquire(timeout=20)
    waiting = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=3))
    closing = threading.Thread(target=room.close, kwargs={"seconds": 30})
    closing.start()
    assert settled(lambda: not room.ready)
    with pytest.raises(CancelledError, match="closing"):
        room.submit(Request(PROMPTS[0]))
    gate.open()
    closing.join(30)
    assert short.result(1) and waiting.result(1) and not closing.is_alive()


def test_closing_at_once_cancels_everything(gated) -> None:
    before = threading.active_count()
    room, gate = gated(rows=1)
    tickets = [room.submit(Request(PROMPTS[0], seed=0)) for _ in range(3)]
    assert gate.arrived.acquire(timeout=20)
    gate.open()
    room.close()
    for ticket in tickets:
        with pytest.raises(CancelledError, match="closed before"):
            ticket.result(1)
    assert threading.active_count() == before
    room.close()


@pytest.mark.parametrize(
    "limits", [{"rows": 0}, {"queue": 0}, {"call_rows": (4, 2), "rows": 2}, {"call_rows": (4,), "rows": 8}]
)
def test_limits_that_make_no_sense(limits: dict) -> None:
    with pytest.raises(SpecError, match="engine room: "):
        Limits(**limits)
