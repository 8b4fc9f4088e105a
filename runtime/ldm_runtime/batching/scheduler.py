"""Batches requests in flight: they join the running UNet batch at any step and leave when they are done."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from ldm_runtime.batching.active_batches import ActiveBatches
from ldm_runtime.batching.counters import Counters, Snapshot
from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.notifier import Notifier
from ldm_runtime.batching.request_queue import PRIORITIES, RequestQueue
from ldm_runtime.batching.self_test import self_test_request
from ldm_runtime.batching.spans import record_spans
from ldm_runtime.errors import BackendError, CancelledError, DeadlineError, LdmError, QueueFullError, SpecError
from ldm_runtime.number_checks import MAX_SECONDS, as_integer, number, seconds, shown
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.plan import Plan
from ldm_runtime.request import Request
from ldm_runtime.tracing import current_context

__all__ = ["BatchScheduler"]

_log = logging.getLogger(__name__)
RETRY_SECONDS = (0.5, 30.0)
"""Seconds between self-tests after a failure: the first delay, which doubles each time, and the longest."""


class BatchScheduler:
    """Runs a pipeline for many callers at once, in its own thread. It does not close the pipeline.

    A request that runs alone produces exactly the image of ``pipeline(...)``. In a batch the UNet runs with other
    shapes, so latents differ in the last bits and pixels by at most 1/255. On a GPU, batches are padded, so this also
    applies to a single request with three, five or more images.

    If the pipeline has a device loop, the requests that the loop supports run in batches on the device, guided and
    unguided requests separately. Other requests run in batches in NumPy.

    Args:
        pipeline: The loaded pipeline. No other thread may use it until the scheduler is closed.
        limits: Limits of the batches and the queue.
        warm_up: True generates a test image before the constructor returns, False soon after it, on the scheduler's
            thread; until then the scheduler is not ready.

    Raises:
        LdmError: The test image cannot be generated.

    Examples:
        >>> with BatchScheduler(pipe) as scheduler:
        ...     images = scheduler.submit(Request("a red circle"), timeout=60).result().images
    """

    def __init__(self, pipeline: LatentDiffusionPipeline, limits: Limits | None = None, *, warm_up: bool = True):
        limits = limits or Limits()
        self._pipeline, self._limits = pipeline, limits
        self._queue = RequestQueue(limits.max_queue, limits.aging_seconds)
        self._counters = Counters(limits.max_rows)
        self._changed = threading.Condition()
        self._closing = False
        self._drain_until = 0.0
        self._last_progress = time.monotonic()
        self._noise_executor = ThreadPoolExecutor(1, "ldm-noise")
        self._notifier = Notifier()
        self._active = ActiveBatches(pipeline, limits, self._counters, self._noise_executor, self._notify)
        self._testing = False
        try:
            self._test_request = self_test_request(pipeline)
            if warm_up:
                self._self_test()
        except BaseException:
            self._noise_executor.shutdown()
            self._notifier.close(1)
            raise
        self._active.unhealthy = not warm_up
        self._thread = threading.Thread(target=self._run, name="ldm-batch-scheduler", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request | Plan,
        *,
        priority: int = 2,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        preview_every: int = 0,
    ) -> Job:
        """Add a request to the queue; returns at once.

        Args:
            request: A request, or the result of ``pipeline.plan`` for one. Its conditioning is encoded later; a text
                that cannot be tokenized fails the job.
            priority: 0 (most urgent) to 4.
            timeout: Seconds until the request expires, in the queue or while it runs; None for no deadline.
            on_progress: Called after each step, on the notifier thread.
            preview_every: Steps between two previews in ``on_progress``, which cost a decoder call each; 0 for none.

        Raises:
            SpecError: A value cannot be used, or the request needs more than ``max_rows`` rows.
            QueueFullError: The queue is full, or the engine fails.
            CancelledError: The scheduler is closing.
        """
        plan = request if isinstance(request, Plan) else self._pipeline.plan(request)
        priority, timeout, preview_every = _checked(priority, timeout, preview_every)
        if plan.rows > self._limits.max_rows:
            raise SpecError(
                f"images: {plan.images} images need {plan.rows} rows of a UNet call (with guidance two each), expected "
                f"at most {self._limits.max_rows}; make several requests"
            )
        job = Job(plan, priority=priority, timeout=timeout, on_progress=on_progress, preview_every=preview_every)
        job.trace_context = current_context()
        with self._changed:
            if self._closing:
                raise CancelledError("batch scheduler: closing, no more requests are accepted")
            if not self.ready:
                self._counters.ended("refused")
                raise QueueFullError("batch scheduler: the engine fails or does not respond; try again later")
            self._sweep_queue()
            try:
                self._queue.push(job)
            except QueueFullError:
                self._counters.ended("refused")
                raise
            self._changed.notify()
        return job

    @property
    def ready(self) -> bool:
        """True if images can be generated: the last attempt succeeded, the threads are alive, and no call is stalled.

        Each self-test also uses the thread that generates noise, so a failure of that thread is noticed.
        """
        idle = not (self._active or self._queue or self._testing)
        moving = idle or time.monotonic() - self._last_progress < self._limits.stall_timeout
        alive = self._thread.is_alive() and self._notifier.is_alive()
        return not self._active.unhealthy and not self._closing and alive and moving

    def snapshot(self) -> Snapshot:
        """Counters and current state."""
        return self._counters.snapshot(ready=self.ready, waiting=len(self._queue), running=len(self._active))

    def close(self, timeout: float = 0.0) -> None:
        """Refuse new requests, finish the others within ``timeout`` seconds, cancel the rest, and end the threads.

        Raises:
            SpecError: ``timeout`` is not a number from 0; the scheduler goes on.
        """
        timeout = number("timeout", timeout, 0, MAX_SECONDS)
        with self._changed:
            if not self._closing:
                self._closing, self._drain_until = True, time.monotonic() + timeout
            self._changed.notify()
        self._thread.join()
        self._noise_executor.shutdown()
        self._notifier.close(10)

    def __enter__(self) -> BatchScheduler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The methods below run on the scheduler's own thread.

    def _run(self) -> None:
        reason: LdmError = CancelledError("request: the batch scheduler was closed before it was done")
        try:
            while self._wait():
                while (job := self._next()) is not None:
                    self._active.join(job)
                self._active.remove_stopped()
                self._active.step()
        except BaseException as error:
            _log.exception("the batch scheduler has failed")
            reason = BackendError(f"batch scheduler: failed ({type(error).__name__}: {error}); restart it")
        with self._changed:
            self._closing = True
            unserved = self._queue.remove_if(lambda job: True)
        for job in unserved:
            self._notify(job, reason)
        self._active.abandon(reason)

    def _wait(self) -> bool:
        """Wait for work; return False if the thread must end. Runs self-tests after failures and after idle time."""
        delay = RETRY_SECONDS[0]
        while True:
            with self._changed:
                if self._active.unhealthy:
                    self._changed.wait(delay)
                    self._sweep_queue()
                else:
                    self._changed.wait_for(
                        lambda: self._queue or self._active or self._closing, self._limits.self_test_after
                    )
                self._last_progress = time.monotonic()
                idle = not (self._queue or self._active)
                if self._closing and (idle or self._active.unhealthy or self._last_progress > self._drain_until):
                    return False
                if not self._active.unhealthy and not idle:
                    return True
            self._testing = True
            try:
                self._self_test()
                self._active.unhealthy = False
            except BaseException as error:
                self._active.unhealthy = True
                delay = min(2 * delay, RETRY_SECONDS[1])
                _log.error("self-test failed: %s: %s", type(error).__name__, error)
            self._testing = False

    def _self_test(self) -> None:
        """Generate a test image; NaN or infinite values in it raise SpecError."""
        self._noise_executor.submit(int).result()
        for step in self._pipeline.steps(self._test_request):
            latents = step.latents
        self._pipeline.decode(latents)

    def _next(self) -> Job | None:
        with self._changed:
            self._sweep_queue()
            return None if self._active.unhealthy else self._queue.pop(self._active.fits)

    def _sweep_queue(self) -> None:
        """Remove cancelled and expired jobs from the queue; the caller holds the lock."""
        now = time.monotonic()
        for job in self._queue.remove_if(lambda job: job.stop_reason(now) is not None):
            if (reason := job.stop_reason(now)) is not None:
                self._notify(job, reason)

    def _notify(self, job: Job, message: Progress | JobResult | LdmError) -> None:
        if not isinstance(message, Progress):
            outcome = _outcome(message)
            self._counters.ended(outcome)
            record_spans(job, outcome)
        self._notifier.notify(job, message)


def _checked(priority: int, timeout: float | None, preview_every: int) -> tuple[int, float | None, int]:
    """Check the options of ``submit`` and convert them to Python numbers; invalid ones raise SpecError."""
    urgency, every = as_integer(priority), as_integer(preview_every)
    if urgency is None or urgency not in PRIORITIES:
        raise SpecError(f"priority: got {shown(priority)}, expected 0 (most urgent) to {PRIORITIES[-1]}")
    if every is None or every < 0:
        raise SpecError(f"preview_every: got {shown(preview_every)}, expected a number of steps, or 0 for none")
    return urgency, None if timeout is None else seconds("timeout", timeout), every


def _outcome(message: JobResult | LdmError) -> str:
    match message:
        case JobResult():
            return "done"
        case CancelledError():
            return "cancelled"
        case DeadlineError():
            return "expired"
    return "failed"
