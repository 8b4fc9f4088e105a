"""Metrics of the batch scheduler: names, descriptions, and values in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ldm_runtime.batching.counters import Snapshot

__all__ = ["COUNTERS", "GAUGES", "exposition", "lines", "samples"]

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


def samples(snapshot: Snapshot) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield name, labels and value of each metric."""
    yield "ldm_ready", {}, float(snapshot.ready)
    yield "ldm_queue_length", {}, float(snapshot.waiting)
    yield "ldm_running_requests", {}, float(snapshot.running)
    yield "ldm_batch_fill", {}, snapshot.batch_fill
    yield "ldm_steps_per_second", {}, snapshot.steps_per_second
    yield "ldm_unet_calls_total", {}, float(snapshot.steps)
    yield "ldm_unet_rows_total", {}, float(snapshot.rows)
    for outcome, count in snapshot.outcomes.items():
        yield "ldm_requests_total", {"outcome": outcome}, float(count)
    for stage, seconds in snapshot.seconds.items():
        yield "ldm_stage_seconds_total", {"stage": stage}, seconds


def exposition(snapshots: Mapping[str, Snapshot]) -> str:
    """Return the metrics of several models in Prometheus' text format, version 0.0.4.

    Args:
        snapshots: Name of a model, which becomes the label ``model`` -> its counters.
    """
    found = [
        (name, {"model": model, **labels}, value)
        for model, snapshot in snapshots.items()
        for name, labels, value in samples(snapshot)
    ]
    return "".join((*lines("gauge", GAUGES, found), *lines("counter", COUNTERS, found)))


def lines(
    kind: str, families: Mapping[str, str], found: Iterable[tuple[str, Mapping[str, str], float]]
) -> Iterator[str]:
    """Yield the lines of metrics in Prometheus' text format, each with its line break.

    Args:
        kind: "gauge" or "counter".
        families: Name of a metric -> its description.
        found: Name, labels and value of samples; those of other metrics are left out.
    """
    values = list(found)
    for name, text in families.items():
        yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
        for sample, labels, value in values:
            if sample == name:
                yield f"{name}{{{_labels(labels)}}} {value!r}\n"


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
