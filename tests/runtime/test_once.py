"""Objects that are created once per process, and counters, when several threads use them at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from ldm_runtime.backends import memory, openvino
from ldm_runtime.batching.counters import Counters
from ldm_runtime.once import once


class Meeting:
    """Returns soon after two threads have come, or after a while if only one can come."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)

    def __call__(self) -> None:
        with suppress(threading.BrokenBarrierError):
            self._barrier.wait(0.2)


def twice(function) -> list[object]:
    """The results of two calls at the same time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda _: function(), range(2)))


def test_threads_share_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting = Meeting()

    class Slow(memory.CudaMemory):
        def __init__(self, cuda: object):
            meeting()

    monkeypatch.setattr(memory, "Cuda", lambda extra: None)
    monkeypatch.setattr(memory, "CudaMemory", Slow)
    first, second = twice(lambda: memory.cuda_memory("test"))
    assert first is second is memory.cuda_memory("test")


def test_threads_share_the_core_of_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    meeting, imported = Meeting(), openvino.import_engine
    monkeypatch.setattr(openvino, "import_engine", lambda *names: (meeting(), imported(*names))[1])
    monkeypatch.setattr(openvino, "core", once(openvino.core.__wrapped__))  # type: ignore[attr-defined]
    first, second = twice(lambda: openvino.core())
    assert first is second


def test_an_error_is_not_kept() -> None:
    calls: list[int] = []

    @once
    def create() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("first")
        return len(calls)

    with pytest.raises(ValueError, match="first"):
        create()
    assert [create(), create()] == [2, 2]


def test_threads_count_every_request() -> None:
    meeting = Meeting()

    class Slow(dict[str, int]):
        def __getitem__(self, name: str) -> int:
            value = super().__getitem__(name)
            meeting()
            return value

    counters = Counters(1)
    counters.outcomes = Slow(counters.outcomes)
    twice(lambda: counters.ended("done"))
    assert counters.snapshot(ready=True, waiting=0, running=0).outcomes["done"] == 2
