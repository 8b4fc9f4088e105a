"""Codes of Triton's errors, and when metrics are written; against the interface of triton_python_backend_utils."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from ldm_runtime.batching.counters import Counters
from ldm_runtime.errors import (
    AnsweredError,
    BackendError,
    CancelledError,
    DeadlineError,
    LdmError,
    QueueFullError,
    SpecError,
)
from ldm_runtime.triton.open_requests import triton_error
from ldm_runtime.triton.prometheus import MetricsExporter


@dataclass
class TritonError:
    message: str
    code: int
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)


class Metric:
    def __init__(self, names: list[str], name: str):
        self._names, self._name, self._value = names, name, 0.0

    def value(self) -> float:
        return self._value

    def set(self, value: float) -> None:
        self._names.append(self._name)
        self._value = value

    def increment(self, value: float) -> None:
        self.set(self._value + value)


class Backend:
    """What the tests need of the module."""

    TritonError = TritonError

    def __init__(self) -> None:
        self.updated: list[str] = []
        names = self.updated

        class MetricFamily:
            GAUGE, COUNTER = range(2)

            def __init__(self, name: str, description: str, kind: int):
                self._name = name

            def Metric(self, labels: dict[str, str]) -> Metric:
                return Metric(names, self._name)

        self.MetricFamily: Any = MetricFamily


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SpecError("steps: got 0"), TritonError.INVALID_ARG),
        (QueueFullError("queue: full"), TritonError.UNAVAILABLE),
        (DeadlineError("request: still running after its 1 s"), TritonError.UNAVAILABLE),
        (CancelledError("request: cancelled"), TritonError.CANCELLED),
        (BackendError("unet: failed"), TritonError.INTERNAL),
        (LdmError("other"), TritonError.INTERNAL),
        (ValueError("unexpected"), TritonError.INTERNAL),
        (AnsweredError("steps: got 0", TritonError.INVALID_ARG), TritonError.INVALID_ARG),
    ],
)
def test_codes(error: Exception, code: int) -> None:
    converted = triton_error(error, Backend())
    assert converted.code == code and str(error) in converted.message


def test_metrics_are_written_at_once_and_only_if_they_have_changed() -> None:
    backend, counters = Backend(), Counters(8)
    state = [counters.snapshot(ready=True, waiting=0, running=0)]
    exporter = MetricsExporter(backend, {"model_name": "m", "model_version": "1"}, lambda: state[0])
    exporter.update()
    backend.updated.clear()
    exporter.update()
    assert backend.updated == []
    state[0] = replace(state[0], waiting=3)
    exporter.update()
    assert backend.updated == ["ldm_queue_length"]
    exporter.close()
    state[0] = replace(state[0], waiting=4)
    exporter.update()
    assert backend.updated == ["ldm_queue_length"]
