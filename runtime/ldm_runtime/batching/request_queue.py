"""Bounded priority queue with aging: every admitted request is eventually served."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from ldm_runtime.batching.job import Job
from ldm_runtime.errors import QueueFullError

__all__ = ["PRIORITIES", "RequestQueue"]

PRIORITIES = range(5)
"""0 is the most urgent; the default is 2."""


class RequestQueue:
    """Jobs ordered by arrival time plus ``aging_seconds`` for each priority level.

    A more urgent job overtakes an earlier one only if it arrives at most ``aging_seconds`` times the difference in
    priority later. Jobs of one priority are served in order of arrival. Not thread-safe: the scheduler holds a lock.

    Args:
        max_queue: Maximum number of jobs.
        aging_seconds: Value of one priority level in seconds.
    """

    def __init__(self, max_queue: int, aging_seconds: float):
        self._max_queue, self._aging_seconds = max_queue, aging_seconds
        self._heap: list[tuple[float, int, Job]] = []
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, job: Job) -> None:
        """Add a job.

        Raises:
            QueueFullError: The queue is full.
        """
        if len(self._heap) >= self._max_queue:
            raise QueueFullError(f"queue: full, {self._max_queue} requests are waiting already; try again later")
        key = job.submitted + job.priority * self._aging_seconds
        heapq.heappush(self._heap, (key, next(self._count), job))

    def pop(self, fits: Callable[[Job], bool]) -> Job | None:
        """Remove and return the first job if it fits, else None; later jobs do not overtake a job that is too large."""
        return heapq.heappop(self._heap)[2] if self._heap and fits(self._heap[0][2]) else None

    def remove_if(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Remove and return all jobs for which ``unwanted`` is true."""
        removed = [entry[2] for entry in self._heap if unwanted(entry[2])]
        if removed:
            self._heap = [entry for entry in self._heap if entry[2] not in removed]
            heapq.heapify(self._heap)
        return removed
