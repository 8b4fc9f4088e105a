"""Counters of the batch scheduler: requests by outcome, UNet calls, and seconds by stage."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["OUTCOMES", "STAGES", "Counters", "Snapshot", "merged"]

WINDOW = 10.0
"""Seconds over which ``steps_per_second`` and ``batch_fill`` are measured."""
STAGES = ("encode", "unet", "noise", "step", "decode")
"""Stages: conditioning, UNet calls, waiting for noise, the rest of a step, and the decoder including previews."""
OUTCOMES = ("done", "failed", "cancelled", "expired", "refused")


@dataclass(frozen=True)
class Snapshot:
    """State and counters of the scheduler at one moment. Counts and seconds are totals since its start.

    Attributes:
        ready: True if images can be generated.
        waiting, running: Number of requests in the queue and in the batches.
        batch_fill: Used share of ``max_rows``, 0 to 1, mean over the UNet calls of the last 10 seconds.
        steps_per_second: UNet calls per second over the last 10 seconds.
        steps, rows: UNet calls, and the sum of their rows.
        outcomes: Number of requests by outcome, one of ``OUTCOMES``.
        seconds: Seconds by stage, one of ``STAGES``.
    """

    ready: bool
    waiting: int
    running: int
    batch_fill: float
    steps_per_second: float
    steps: int
    rows: int
    outcomes: dict[str, int]
    seconds: dict[str, float]


class Counters:
    """Counters of one scheduler. Any thread may count outcomes and take snapshots; only the worker counts the rest.

    Args:
        max_rows: Maximum rows of a UNet call.
    """

    def __init__(self, max_rows: int):
        self._max_rows = max_rows
        self.steps = self.rows = 0
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self._lock = threading.Lock()
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._recent: deque[tuple[float, int]] = deque(maxlen=100_000)

    def ended(self, outcome: str) -> None:
        """Count a request that has ended with one of ``OUTCOMES``."""
        with self._lock:
            self.outcomes[outcome] += 1

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the duration of the block to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def step(self, rows: int) -> None:
        """Count a UNet call with ``rows`` rows in use."""
        self.steps += 1
        self.rows += rows
        self._recent.append((time.monotonic(), rows))

    def snapshot(self, *, ready: bool, waiting: int, running: int) -> Snapshot:
        """Copy all counters, together with the given state of the scheduler."""
        since = time.monotonic() - WINDOW
        recent = [rows for when, rows in list(self._recent) if when > since]
        return Snapshot(
            ready=ready,
            waiting=waiting,
            running=running,
            batch_fill=sum(recent) / (len(recent) * self._max_rows) if recent else 0.0,
            steps_per_second=len(recent) / WINDOW,
            steps=self.steps,
            rows=self.rows,
            outcomes=dict(self.outcomes),
            seconds=dict(self.seconds),
        )


def merged(snapshots: Sequence[Snapshot]) -> Snapshot:
    """Add the counters of several schedulers of one model; readiness and ``batch_fill`` are those of the first.

    Args:
        snapshots: At least one.
    """
    first = snapshots[0]
    return Snapshot(
        ready=first.ready,
        waiting=sum(one.waiting for one in snapshots),
        running=sum(one.running for one in snapshots),
        batch_fill=first.batch_fill,
        steps_per_second=sum(one.steps_per_second for one in snapshots),
        steps=sum(one.steps for one in snapshots),
        rows=sum(one.rows for one in snapshots),
        outcomes={name: sum(one.outcomes[name] for one in snapshots) for name in OUTCOMES},
        seconds={name: sum(one.seconds[name] for one in snapshots) for name in STAGES},
    )
