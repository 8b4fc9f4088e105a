"""A UNet that stops before every call, so that a test decides what happens between two denoising steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Feed = Mapping[str, NDArray[np.generic]]
PROMPTS = [
    "a large red circle in the center on a white background",
    "a small blue triangle left of a large yellow cross on a gray background",
    "a small green square above a large purple square on a black background",
]
TIMEOUT = 60
"""Seconds after which a call that is not let through, or one that does not arrive, fails the test."""


class StepGate:
    """Replaces the UNet's ``run``: every call waits until the test lets it through.

    Attributes:
        rows: The number of rows of each call, in the order of the calls.
        feeds: The UNet's inputs of each call.
    """

    def __init__(self, run: Callable[[Feed], dict[str, NDArray[np.float32]]]) -> None:
        self.run = run
        self.rows: list[int] = []
        self.feeds: list[Feed] = []
        self._arrived, self._permits = threading.Semaphore(0), threading.Semaphore(0)
        self._is_open = threading.Event()

    def __call__(self, feed: Feed) -> dict[str, NDArray[np.float32]]:
        self.rows.append(len(feed["sample"]))
        self.feeds.append(dict(feed))
        self._arrived.release()
        if not self._is_open.is_set():
            assert self._permits.acquire(timeout=TIMEOUT), "StepGate: nobody let the call through"
        return self.run(feed)

    def wait_for_call(self) -> None:
        """Wait until a call stands at the gate."""
        assert self._arrived.acquire(timeout=TIMEOUT), "StepGate: no call arrived"

    def let_through(self) -> None:
        """Let one call through without waiting for the next."""
        self._permits.release()

    def advance(self, calls: int = 1) -> None:
        """Let calls through one by one; after each, wait until the next stands at the gate."""
        for _ in range(calls):
            self.let_through()
            self.wait_for_call()

    def open(self) -> None:
        """Let every waiting and later call through."""
        self._is_open.set()
        self._permits.release()
