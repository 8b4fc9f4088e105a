"""One request in the engine room: its plan, its time, and the future its caller waits on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import CancelledError, DeadlineError, LdmError
from ldm_runtime.request import Plan
from ldm_runtime.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Progress:
    """One finished step: its index from 0, how many there are, and now and then uint8 [images, H, W, 3] as foreseen."""

    index: int
    total: int
    preview: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class JobResult:
    """What a request gives: uint8 [images, H, W, 3], the seeds they were drawn from, seconds waited and worked."""

    images: NDArray[np.uint8]
    seeds: tuple[int, ...]
    waited: float
    worked: float


class Job:
    """A request that was let in; made by ``BatchScheduler.submit``.

    Any thread may cancel it or wait for it. ``future`` holds the ``JobResult`` or an LdmError; callbacks added to it,
    and ``progress``, run on the room's notifier thread, so that a slow one delays other callbacks but no step.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: Schedule,
        *,
        priority: int,
        seconds: float | None,
        progress: Callable[[Progress], None] | None,
        preview_every: int,
    ):
        self.plan, self.schedule, self.priority = plan, schedule, priority
        self.coefficients = schedule.unclipped_rows()
        """(a, b, c) of every step, as ``Schedule.rows``."""
        self.progress, self.preview_every = progress, preview_every
        self.submitted = time.monotonic()
        self.due = None if seconds is None else self.submitted + seconds
        self.begun: float | None = None
        self.cancelled = False
        self.future: Future[JobResult] = Future()

    @property
    def rows(self) -> int:
        """Rows it takes in a UNet call: one for each image, two with guidance."""
        return self.plan.shape[0] * (2 if self.plan.guided else 1)

    def cancel(self) -> None:
        """Ask it to stop: it leaves the queue, or the running batch before the next step, with a CancelledError."""
        self.cancelled = True

    def result(self, timeout: float | None = None) -> JobResult:
        """Wait for the pictures.

        Raises:
            CancelledError, DeadlineError, BackendError, SpecError: why there are none.
            TimeoutError: not done after ``timeout`` seconds; it goes on.
        """
        return self.future.result(timeout)

    def stopped(self, now: float) -> LdmError | None:
        """Why it must not go on: cancelled, or past its deadline."""
        if self.cancelled:
            return CancelledError("request: cancelled by its caller")
        if self.due is not None and now > self.due:
            place = "waiting" if self.begun is None else "running"
            return DeadlineError(
                f"request: still {place} after its {self.due - self.submitted:g} s; give it more time, "
                "or ask for fewer steps or images"
            )
        return None
