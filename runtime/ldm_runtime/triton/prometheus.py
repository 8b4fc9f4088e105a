"""Exports the counters of the batch scheduler to Triton's metrics endpoint, in Prometheus format."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ldm_runtime.batching.counters import Snapshot

__all__ = ["MetricsExporter"]

PERIOD_SECONDS = 0.5
GAUGES = {
    "ldm_ready": "1 if images can be generated",
    "ldm_queue_length": "waiting requests",
    "ldm_running_requests": "requests in the running batches",
    "ldm_batch_fill": "used share of the maximum rows of a UNet call, mean over the last ten seconds",
    "ldm_steps_per_second": "UNet calls per second over the last ten seconds",
}
COUNTERS = {
    "ldm_unet_calls_total": "UNet calls",
    "ldm_unet_rows_total": "rows of all UNet calls",
    "ldm_requests_total": "requests by outcome",
    "ldm_stage_seconds_total": "seconds by stage",
}


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
        single = {
            "ldm_ready": snapshot.ready,
            "ldm_queue_length": snapshot.waiting,
            "ldm_running_requests": snapshot.running,
            "ldm_batch_fill": snapshot.batch_fill,
            "ldm_steps_per_second": snapshot.steps_per_second,
            "ldm_unet_calls_total": snapshot.steps,
            "ldm_unet_rows_total": snapshot.rows,
        }
        for name, value in single.items():
            self._set(name, {}, value)
        for outcome, count in snapshot.outcomes.items():
            self._set("ldm_requests_total", {"outcome": outcome}, count)
        for stage, seconds in snapshot.seconds.items():
            self._set("ldm_stage_seconds_total", {"stage": stage}, seconds)

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
