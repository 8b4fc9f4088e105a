"""The queue before the engine room: bounded, by priority, and nobody waits for ever."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from ldm_runtime.batching.job import Job
from ldm_runtime.errors import QueueFullError

PRIORITIES = range(5)
"""0 is the most urgent; the usual one is 2."""


class RequestQueue:
    """Tickets in the order in which they run: by arrival time plus ``patience`` seconds for each step of priority.

    So a ticket is overtaken by more urgent ones that come at most ``patience`` × the difference later, never by those
    after: within a priority it is first come, first served, and every wait ends. Not thread-safe: the room locks.

    Args:
        most: tickets that may wait.
        patience: seconds that one step of priority is worth.
    """

    def __init__(self, most: int, patience: float):
        self._most, self._patience = most, patience
        self._heap: list[tuple[float, int, Job]] = []
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, ticket: Job) -> None:
        """Let a ticket wait.

        Raises:
            QueueFullError: too many wait already.
        """
        if len(self._heap) >= self._most:
            raise QueueFullError(f"queue: {self._most} requests wait already, the most that may; ask again later")
        key = ticket.submitted + ticket.priority * self._patience
        heapq.heappush(self._heap, (key, next(self._count), ticket))

    def take(self, fits: Callable[[Job], bool]) -> Job | None:
        """The first ticket if it fits; one that does not is not passed by those behind it."""
        return heapq.heappop(self._heap)[2] if self._heap and fits(self._heap[0][2]) else None

    def drop(self, unwanted: Callable[[Job], bool]) -> list[Job]:
        """Take out all tickets that are not wanted any more."""
        dropped = [entry[2] for entry in self._heap if unwanted(entry[2])]
        if dropped:
            self._heap = [entry for entry in self._heap if entry[2] not in dropped]
            heapq.heapify(self._heap)
        return dropped
