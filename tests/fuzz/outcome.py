"""Decides what an input has come to: accepted, refused, or a failure of the program."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import FrameType

from ldm_runtime.errors import LdmError

__all__ = ["Attempt", "Counts", "Hang", "outcome", "try_inputs"]

SECONDS = 60.0
"""Longest time for one input; beyond it, it counts as a hang."""
ACCEPTED, REFUSED = "accepted", "refused"

Attempt = Callable[[Random], object]
"""Makes one input from a generator and gives it to the program. Raises what the program raises."""


class Hang(BaseException):
    """An input takes too long. Not an ``Exception``, so that the program does not handle it."""


@dataclass
class Counts:
    """Results of the inputs of one kind."""

    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """Number of inputs."""
        return self.accepted + self.refused + len(self.failures)

    def add(self, number: int, result: str) -> None:
        """Count the result of an input."""
        if result == ACCEPTED:
            self.accepted += 1
        elif result == REFUSED:
            self.refused += 1
        else:
            self.failures.append(f"input {number}: {result}")


def outcome(run: Callable[[], object], seconds: float = SECONDS) -> str:
    """Return "accepted", "refused", or a description of the failure.

    A failure is an exception other than an ``LdmError``, an ``LdmError`` whose message is not one line of at most
    ``max_message`` characters, a lack of memory, or more than ``seconds``.
    """
    try:
        with _limited(seconds), warnings.catch_warnings(action="ignore"):
            run()
    except LdmError as error:
        text = str(error)
        if not text or "\n" in text or "\r" in text or len(text) > error.max_message:
            return f"{type(error).__name__} with a message of {len(text)} characters: {text[:500]!r}"
        return REFUSED
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        place = " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames[-6:]))
        return f"{type(error).__name__}: {str(error)[:200]!r} at {place}"
    return ACCEPTED


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_inputs(attempt: Attempt, first: int, count: int) -> Counts:
    """Try the inputs of the seeds from ``first`` on. Each seed makes the same input at any time."""
    counts = Counts()
    for number in range(first, first + count):
        counts.add(number, outcome(lambda number=number: attempt(Random(number))))  # type: ignore[misc]
    return counts
