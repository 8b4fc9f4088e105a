"""What an engine room has done: counts, and seconds by stage."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

WINDOW = 10.0
"""Seconds over which steps a second and batch fill are taken."""
STAGES = ("encode", "unet", "noise", "step", "decode")
"""Text encoder; UNet calls; waiting for noise; all other work of a step; decoder with its previews."""
OUTCOMES = ("done", "failed", "cancelled", "overdue", "refused")


@dataclass(frozen=True)
class Figures:
    """A room at one moment. Counts and seconds are since its start; rates are of the last ten seconds.

    Attributes:
        ready: a picture can be made.
        waiting, running: requests in the queue and in the batches.
        fill: share of the rows a UNet call may have that were in use, 0 to 1, mean over calls.
        steps_per_second: UNet calls a second.
        steps, rows: UNet calls, and their rows in all.
        outcomes: requests by how they ended.
        seconds: by stage.
    """

    ready: bool
    waiting: int
    running: int
    fill: float
    steps_per_second: float
    steps: int
    rows: int
    outcomes: dict[str, int]
    seconds: dict[str, float]


class Counters:
    """Counts of one room; written by its worker thread, read by any."""

    def __init__(self, most_rows: int):
        self._most_rows = most_rows
        self.steps = self.rows = 0
        self.outcomes = Counter[str](dict.fromkeys(OUTCOMES, 0))
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._recent: deque[tuple[float, int]] = deque(maxlen=100_000)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to a stage."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begun

    def step(self, rows: int) -> None:
        """Count a UNet call of so many rows."""
        self.steps += 1
        self.rows += rows
        self._recent.append((time.monotonic(), rows))

    def figures(self, *, ready: bool, waiting: int, running: int) -> Figures:
        """All of it, as of now."""
        since = time.monotonic() - WINDOW
        recent = [rows for when, rows in list(self._recent) if when > since]
        fill = sum(recent) / (len(recent) * self._most_rows) if recent else 0.0
        return Figures(
            ready=ready,
            waiting=waiting,
            running=running,
            fill=fill,
            steps_per_second=len(recent) / WINDOW,
            steps=self.steps,
            rows=self.rows,
            outcomes=dict(self.outcomes),
            seconds=dict(self.seconds),
        )
