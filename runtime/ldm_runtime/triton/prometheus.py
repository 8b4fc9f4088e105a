"""The engine room's figures on Triton's metrics endpoint."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from ldm_runtime.batching.counters import Figures

PERIOD = 0.5
"""Seconds between two readings."""
GAUGES = {
    "ldm_ready": "1 while a picture can be made",
    "ldm_queue_length": "requests that wait",
    "ldm_running_requests": "requests in the running batches",
    "ldm_batch_fill": "share of a UNet call's rows in use, mean over the last ten seconds",
    "ldm_steps_per_second": "UNet calls a second, over the last ten seconds",
}
COUNTERS = {
    "ldm_unet_calls_total": "UNet calls",
    "ldm_unet_rows_total": "rows of UNet calls",
    "ldm_requests_total": "requests by outcome",
    "ldm_stage_seconds_total": "seconds by stage",
}


class MetricsExporter:
    """Copies figures into Triton's metrics twice a second, on a thread of its own.

    Args:
        pb: triton_python_backend_utils.
        args: what Triton gave to ``initialize``.
        figures: reads them.
    """

    def __init__(self, pb: Any, args: Mapping[str, str], figures: Callable[[], Figures]):
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        kinds = ((GAUGES, pb.MetricFamily.GAUGE), (COUNTERS, pb.MetricFamily.COUNTER))
        self._families = {
            name: pb.MetricFamily(name=name, description=text, kind=kind)
            for described, kind in kinds
            for name, text in described.items()
        }
        self._meters: dict[tuple[str, str], Any] = {}
        self._figures, self._end = figures, threading.Event()
        self._thread = threading.Thread(target=self._run, name="ldm-meters", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._write(self._figures())
            if self._end.wait(PERIOD):
                return

    def _write(self, figures: Figures) -> None:
        single = {
            "ldm_ready": figures.ready,
            "ldm_queue_length": figures.waiting,
            "ldm_running_requests": figures.running,
            "ldm_batch_fill": figures.fill,
            "ldm_steps_per_second": figures.steps_per_second,
            "ldm_unet_calls_total": figures.steps,
            "ldm_unet_rows_total": figures.rows,
        }
        for name, value in single.items():
            self._set(name, {}, value)
        for outcome, count in figures.outcomes.items():
            self._set("ldm_requests_total", {"outcome": outcome}, count)
        for stage, seconds in figures.seconds.items():
            self._set("ldm_stage_seconds_total", {"stage": stage}, seconds)

    def _set(self, family: str, labels: dict[str, str], value: float) -> None:
        key = (family, "".join(labels.values()))
        if key not in self._meters:
            self._meters[key] = self._families[family].Metric(labels={**self._labels, **labels})
        meter = self._meters[key]
        if family in GAUGES:
            meter.set(float(value))
        elif (more := value - meter.value()) > 0:
            meter.increment(more)

    def close(self) -> None:
        """End the thread, and take the figures off the endpoint."""
        self._end.set()
        self._thread.join()
        self._meters.clear()
        self._families.clear()
