"""Many requests in one running UNet batch: they join at any step and leave when done. No server is needed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from ldm_runtime.batching.active_batches import ActiveBatches
from ldm_runtime.batching.counters import Counters, Figures
from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.notifier import Notifier
from ldm_runtime.batching.request_queue import PRIORITIES, RequestQueue
from ldm_runtime.errors import BackendError, CancelledError, DeadlineError, LdmError, QueueFullError, SpecError
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request

_log = logging.getLogger(__name__)
RETRY = (0.5, 30.0)
"""Seconds between tries to make a picture after a failure: the first, and the longest."""


class BatchScheduler:
    """Runs a pipeline for many callers at once; it owns the pipeline's thread, not the pipeline.

    A request alone gives what ``pipeline(...)`` gives, bit for bit; beside others a UNet call has other shapes, whose
    results differ in the last bits, and a pixel by at most 1/255.

    Args:
        pipeline: loaded; no other thread may use it until the room is closed.
        limits: see there.
        prove: make a first picture before the constructor returns; else soon after it, on the room's own thread.

    Raises:
        SpecError: the UNet does not take so many rows.
        BackendError: the pipeline cannot make a picture.
    """

    def __init__(self, pipeline: LatentDiffusionPipeline, limits: Limits | None = None, *, prove: bool = True):
        limits = limits or Limits()
        self._pipeline, self._limits = pipeline, limits
        self._queue = RequestQueue(limits.queue, limits.patience)
        self._tally = Counters(limits.rows)
        self._changed = threading.Condition()
        self._closing = False
        self._until = 0.0
        self._alive = time.monotonic()
        self._drawer = ThreadPoolExecutor(1, "ldm-noise")
        self._notifier = Notifier()
        self._running = ActiveBatches(pipeline, limits, self._tally, self._drawer, self._tell)
        self._proving = False
        try:
            if prove:
                self._prove()
        except LdmError:
            self._drawer.shutdown()
            self._notifier.close(1)
            raise
        self._running.broken = not prove
        self._thread = threading.Thread(target=self._run, name="ldm-engine-room", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        *,
        priority: int = 2,
        seconds: float | None = None,
        progress: Callable[[Progress], None] | None = None,
        preview_every: int = 0,
    ) -> Job:
        """Let a request in; returns at once.

        Args:
            request: what to make. Its prompts are tokenized later; a bad one fails the ticket.
            priority: 0, the most urgent, to 4.
            seconds: it may take from now on; None for no end.
            progress: called after each step, on the notifier's thread.
            preview_every: steps from one preview in ``progress`` to the next, each the cost of a decoding; 0: none.

        Raises:
            SpecError: a value cannot be used, or it never fits.
            QueueFullError: too many wait, or no picture can be made now.
            CancelledError: the room is closing.
        """
        plan = request.plan(self._pipeline.geometry)
        schedule = self._pipeline.scheduler.schedule(request.num_inference_steps, request.eta)
        if type(priority) is not int or priority not in PRIORITIES:
            raise SpecError(f"priority: got {priority!r:.40}, expected 0 (most urgent) to {PRIORITIES[-1]}")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise SpecError(f"seconds: got {seconds!r:.40}, expected a number above 0, or None")
        if type(preview_every) is not int or preview_every < 0:
            raise SpecError(f"preview_every: got {preview_every!r:.40}, expected a number of steps, or 0 for none")
        ticket = Job(
            plan,
            schedule,
            priority=priority,
            seconds=seconds,
            progress=progress,
            preview_every=preview_every,
        )
        if ticket.rows > self._limits.rows:
            raise SpecError(
                f"prompts: {plan.shape[0]} images need {ticket.rows} rows of a UNet call (guided ones two each), "
                f"expected at most {self._limits.rows}; make several requests"
            )
        with self._changed:
            if self._closing:
                raise CancelledError("engine room: closing, no request is taken any more")
            if not self.ready:
                self._tally.outcomes["refused"] += 1
                raise QueueFullError(
                    "engine room: the engine fails or hangs, no picture can be made now; ask again later"
                )
            self._sweep_queue()
            try:
                self._queue.push(ticket)
            except QueueFullError:
                self._tally.outcomes["refused"] += 1
                raise
            self._changed.notify()
        return ticket

    @property
    def ready(self) -> bool:
        """True where a picture can be made: the last try did, the thread lives, and no call hangs."""
        idle = not (self._running or self._queue or self._proving)
        moving = idle or time.monotonic() - self._alive < self._limits.stall
        return not self._running.broken and not self._closing and self._thread.is_alive() and moving

    def figures(self) -> Figures:
        """What it does and has done."""
        return self._tally.figures(ready=self.ready, waiting=len(self._queue), running=len(self._running))

    def close(self, seconds: float = 0.0) -> None:
        """Let nobody in, finish what is in within ``seconds``, cancel the rest, and end the threads."""
        with self._changed:
            if not self._closing:
                self._closing, self._until = True, time.monotonic() + seconds
            self._changed.notify()
        self._thread.join()
        self._drawer.shutdown()
        self._notifier.close(10)

    def __enter__(self) -> BatchScheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # From here on all runs on the room's own thread.

    def _run(self) -> None:
        reason: LdmError = CancelledError("request: the engine room was closed before it was done")
        try:
            while self._wait():
                while (ticket := self._next()) is not None:
                    self._running.join(ticket)
                self._running.sweep()
                self._running.step()
        except BaseException as fault:
            _log.exception("the engine room has failed")
            reason = BackendError(f"engine room: failed ({type(fault).__name__}: {fault}); restart it")
        with self._changed:
            self._closing = True
            left = self._queue.drop(lambda ticket: True)
        for ticket in left:
            self._tell(ticket, reason)
        self._running.abandon(reason)

    def _wait(self) -> bool:
        """Wait for work; return False when the scheduler is to end.

        After a failure, and now and then without work, run the self-test.
        """
        delay = RETRY[0]
        while True:
            with self._changed:
                if self._running.broken:
                    self._changed.wait(delay)
                    self._sweep_queue()
                else:
                    self._changed.wait_for(lambda: self._queue or self._running or self._closing, self._limits.idle)
                self._alive = time.monotonic()
                idle = not (self._queue or self._running)
                if self._closing and (idle or self._running.broken or self._alive > self._until):
                    return False
                if not self._running.broken and not idle:
                    return True
            self._proving = True
            try:
                self._prove()
                self._running.broken = False
            except LdmError as error:
                self._running.broken = True
                delay = min(2 * delay, RETRY[1])
                _log.error("no picture can be made: %s", error)
            self._proving = False

    def _prove(self) -> None:
        """Make a picture of one step; one with NaN is refused."""
        self._pipeline("a", seed=0, num_inference_steps=1)

    def _next(self) -> Job | None:
        with self._changed:
            self._sweep_queue()
            return None if self._running.broken else self._queue.take(self._running.fits)

    def _sweep_queue(self) -> None:
        """Drop those who wait in vain; the caller holds the lock."""
        now = time.monotonic()
        for ticket in self._queue.drop(lambda ticket: ticket.stopped(now) is not None):
            if (reason := ticket.stopped(now)) is not None:
                self._tell(ticket, reason)

    def _tell(self, ticket: Job, message: Progress | JobResult | LdmError) -> None:
        if not isinstance(message, Progress):
            self._tally.outcomes[_outcome(message)] += 1
        self._notifier.tell(ticket, message)


def _outcome(outcome: JobResult | LdmError) -> str:
    match outcome:
        case JobResult():
            return "done"
        case CancelledError():
            return "cancelled"
        case DeadlineError():
            return "overdue"
    return "failed"
