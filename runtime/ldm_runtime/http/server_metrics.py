"""Metrics of the server: those of the batch schedulers, and which bundles are loaded, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from ldm_runtime.batching.metrics import exposition, lines
from ldm_runtime.http.served_models import ServedModels

__all__ = ["SERVER_COUNTERS", "SERVER_GAUGES", "server_metrics"]

SERVER_GAUGES = {
    "ldm_loaded": "1 if the bundle is loaded",
    "ldm_loaded_versions": "loaded versions of the bundle, with those whose requests are not done",
    "ldm_memory_bytes": "estimated bytes of the loaded versions",
}
SERVER_COUNTERS = {"ldm_loads_total": "versions of the bundle that were loaded, by outcome"}


def server_metrics(models: ServedModels) -> str:
    """Return the metrics of all bundles, with their names in the label ``model``."""
    found = list(_samples(models))
    parts = [exposition({name: bundle.snapshot() for name, bundle in models.bundles.items()})]
    parts += lines("gauge", SERVER_GAUGES, found)
    parts += lines("counter", SERVER_COUNTERS, found)
    return "".join(parts)


def _samples(models: ServedModels) -> Iterator[tuple[str, dict[str, str], float]]:
    for name, bundle in models.bundles.items():
        labels = {"model": name}
        yield "ldm_loaded", labels, float(bundle.current is not None)
        yield "ldm_loaded_versions", labels, float(len(bundle.versions))
        yield "ldm_memory_bytes", labels, float(bundle.memory)
        for outcome, count in bundle.loads.items():
            yield "ldm_loads_total", {**labels, "outcome": outcome}, float(count)
