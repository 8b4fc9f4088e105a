"""A UNet that waits at a gate, for tests of what an engine room does between two steps."""

from __future__ import annotations

import threading

PROMPTS = [
    "a large red circle in the center on a white background",
    "a small blue triangle left of a large yellow cross on a gray background",
    "a small green square above a large purple square on a black background",
]


class Gate:
    """The UNet's ``run``, which waits at each call until it is let on, and records what it was given."""

    def __init__(self, run):
        self.run, self.rows, self.times = run, [], []
        self.arrived, self.let_on = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, feed):
        self.rows.append(len(feed["sample"]))
        self.times.append(feed["timestep"].tolist())
        self.arrived.release()
        assert self.let_on.acquire(timeout=60)
        return self.run(feed)

    def on(self, calls: int = 1) -> None:
        """Let calls through, and wait until the next one stands at the gate."""
        for _ in range(calls):
            self.let_on.release()
            assert self.arrived.acquire(timeout=20)

    def open(self) -> None:
        for _ in range(10_000):
            self.let_on.release()
