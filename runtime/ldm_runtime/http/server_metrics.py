"""Metrics of the server in Prometheus' text format: those of the batch schedulers, and of loaded bundles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ldm_runtime.batching.metrics import exposition, lines
from ldm_runtime.http.served_bundle import BundleState
from ldm_runtime.http.served_models import ServedModels

__all__ = ["SERVER_COUNTERS", "SERVER_GAUGES", "server_metrics"]

SERVER_GAUGES = {
    "ldm_loaded": "1 if the bundle is loaded",
    "ldm_loaded_versions": "loaded versions of the bundle, with those whose requests are not done",
    "ldm_memory_bytes": "estimated bytes of the loaded versions",
}
SERVER_COUNTERS = {"ldm_loads_total": "versions of the bundle that were loaded, by outcome"}


def server_metrics(models: ServedModels) -> str:
    """Return the metrics of all bundles; the label ``model`` has the bundle's name."""
    states = models.states()
    found = list(_samples(states))
    parts = [exposition({state.name: state.counters for state in states})]
    parts += lines("gauge", SERVER_GAUGES, found)
    parts += lines("counter", SERVER_COUNTERS, found)
    return "".join(parts)


def _samples(states: Sequence[BundleState]) -> Iterator[tuple[str, dict[str, str], float]]:
    for state in states:
        labels = {"model": state.name}
        yield "ldm_loaded", labels, float(state.loaded)
        yield "ldm_loaded_versions", labels, float(state.versions)
        yield "ldm_memory_bytes", labels, float(state.memory)
        for outcome, count in state.loads.items():
            yield "ldm_loads_total", {**labels, "outcome": outcome}, float(count)
