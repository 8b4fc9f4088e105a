"""A request in the batch scheduler: its plan, its deadline, and the future that its caller waits for."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import CancelledError, DeadlineError, LdmError
from ldm_runtime.plan import Plan

__all__ = ["REQUEST_STAGES", "Job", "JobResult", "Progress"]

REQUEST_STAGES = ("queue", "encode", "steps", "decode")
"""The stages of a request, in their order."""


@dataclass(frozen=True, eq=False)
class Progress:
    """One finished denoising step.

    Attributes:
        index: Index of the step from 0.
        total: Number of steps.
        preview: The images as predicted at this step, uint8 [images, H, W, channels]; None if no preview is due.
    """

    index: int
    total: int
    preview: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class JobResult:
    """Result of a request.

    Attributes:
        images: uint8 [images, H, W, channels].
        seeds: The seeds of the noise, one for all images or one each.
        seconds_waiting: Time in the queue.
        seconds_running: Time from the first step to the decoded images.
        flagged: See ``Generation``.
    """

    images: NDArray[np.uint8]
    seeds: tuple[int, ...]
    seconds_waiting: float
    seconds_running: float
    flagged: tuple[bool, ...] | None = None


class Job:
    """An admitted request; returned by ``BatchScheduler.submit``.

    Any thread may cancel it or wait for it. ``future`` receives the ``JobResult`` or an ``LdmError``. Callbacks of the
    future and ``on_progress`` run on the scheduler's notifier thread: a slow callback delays other callbacks but no
    denoising step.

    Args:
        plan: The checked request.
        priority: 0 (most urgent) to 4.
        timeout: Seconds until the request expires; None for no deadline.
        on_progress: Called after each step.
        preview_every: Steps between two previews; 0 for none.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        priority: int = 2,
        timeout: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        preview_every: int = 0,
    ):
        self.plan, self.priority, self.on_progress, self.preview_every = plan, priority, on_progress, preview_every
        self.submitted = time.monotonic()
        self.deadline = None if timeout is None else self.submitted + timeout
        self.started: float | None = None
        self.encoded: float | None = None
        self.sampled: float | None = None
        """``time.monotonic()`` when it left the queue, when its conditioning was encoded, and after its last step."""
        self.trace_context: object = None
        """``tracing.current_context()`` when it was submitted."""
        self.cancelled = False
        self.future: Future[JobResult] = Future()

    def cancel(self) -> None:
        """Cancel the request. It leaves the queue, or its batch before the next step, with a ``CancelledError``."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the images.

        Args:
            timeout: Seconds to wait; None waits until the request ends.

        Raises:
            CancelledError, DeadlineError, BackendError, SpecError: The request has failed; the message says why.
            TimeoutError: The request did not end in time. It continues.
        """
        return self.future.result(timeout)

    def stages(self, now: float) -> list[tuple[str, float, float]]:
        """Name, beginning and end of each stage that the request has reached; the last one ends ``now``.

        All times are of ``time.monotonic()``, in seconds.
        """
        begun = (self.submitted, self.started, self.encoded, self.sampled)
        reached = [(stage, moment) for stage, moment in zip(REQUEST_STAGES, begun, strict=True) if moment is not None]
        ends = [*(moment for _, moment in reached[1:]), now]
        return [(stage, moment, end) for (stage, moment), end in zip(reached, ends, strict=True)]

    def stop_reason(self, now: float) -> LdmError | None:
        """The error with which the request must end at time ``now`` (``time.monotonic()``); None if it may continue."""
        if self.cancelled:
            return CancelledError("request: cancelled by its caller")
        if self.deadline is not None and now > self.deadline:
            place = "waiting" if self.started is None else "running"
            return DeadlineError(
                f"request: still {place} after its {self.deadline - self.submitted:g} s; use a longer timeout, "
                "fewer steps or fewer images"
            )
        return None
