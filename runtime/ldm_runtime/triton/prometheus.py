"""Exports the counters of the batch scheduler to Triton's metrics endpoint, in Prometheus format."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ldm_runtime.batching.counters import Snapshot
from ldm_runtime.batching.metrics import COUNTERS, GAUGES, samples

__all__ = ["MetricsExporter"]

PERIOD_SECONDS = 0.5


class MetricsExporter:
    """Copies a snapshot of the counters into Triton's metrics at each ``update`` and twice a second.

    Args:
        pb: triton_python_backend_utils.
        args: The argument of the model's ``initialize``.
        snapshot: Reads the counters.
    """

    def __init__(self, pb: Any, args: Mapping[str, str], snapshot: Callable[[], Snapshot]):
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        kinds = ((GAUGES, pb.MetricFamily.GAUGE), (COUNTERS, pb.MetricFamily.COUNTER))
        self._families = {
            name: pb.MetricFamily(name=name, description=text, kind=kind)
            for described, kind in kinds
            for name, text in described.items()
        }
        self._metrics: dict[tuple[str, str], Any] = {}
        self._values: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()
        self._snapshot, self._end = snapshot, threading.Event()
        self._thread = threading.Thread(target=self._run, name="ldm-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.update()
            if self._end.wait(PERIOD_SECONDS):
                return

    def update(self) -> None:
        """Write the values that have changed; after ``close`` nothing is written."""
        with self._lock:
            if not self._end.is_set():
                self._write(self._snapshot())

    def _write(self, snapshot: Snapshot) -> None:
        for name, labels, value in samples(snapshot):
            self._set(name, labels, value)

    def _set(self, family: str, labels: dict[str, str], value: float) -> None:
        key = (family, "".join(labels.values()))
        if key not in self._metrics:
            self._metrics[key] = self._families[family].Metric(labels={**self._labels, **labels})
            self._values[key] = self._metrics[key].value()
        before, self._values[key] = self._values[key], float(value)
        if value == before:
            return  # each change is a message to the server
        if family in GAUGES:
            self._metrics[key].set(float(value))
        elif value > before:
            self._metrics[key].increment(value - before)
        else:
            self._values[key] = before

    def close(self) -> None:
        """End the thread and remove the metrics from the endpoint."""
        self._end.set()
        self._thread.join()
        with self._lock:
            self._metrics.clear()
            self._values.clear()
        self._families.clear()
