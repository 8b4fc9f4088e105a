"""A bundle of the server: the version that takes requests, and older versions that still have running requests."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm_runtime.batching.counters import OUTCOMES, STAGES, Snapshot, merged
from ldm_runtime.http.served_model import ServedModel, model_facts
from ldm_runtime.model import ModelDescription

__all__ = ["LOADS", "BundleState", "ServedBundle"]

LOADS = ("done", "failed")
"""Outcomes of loading a version."""
_NOTHING = Snapshot(True, 0, 0, 0.0, 0.0, 0, 0, dict.fromkeys(OUTCOMES, 0), dict.fromkeys(STAGES, 0.0))


@dataclass(frozen=True)
class BundleState:
    """State of a bundle at one moment, for the metrics.

    Attributes:
        name: Name in the API.
        loaded: True if a version takes requests.
        versions: Number of loaded versions, including older ones that still have running requests.
        memory: Estimated bytes of these versions.
        loads: Number of versions by outcome of loading, one of ``LOADS``.
        counters: Counters of all versions, and readiness of the current one.
    """

    name: str
    loaded: bool
    versions: int
    memory: int
    loads: dict[str, int]
    counters: Snapshot


@dataclass(eq=False)
class ServedBundle:
    """State of one bundle. ``ServedModels`` changes it, and reads more than one attribute of it, under its own lock.

    Attributes:
        name: Name in the API.
        path: The bundle's folder; None if the caller loaded ``current``, which is then never replaced.
        model: Description of the version whose manifest was read last.
        current: The version that takes requests; None if it is not loaded.
        loading: The version that is being loaded, if there is one.
        retired: Versions that take no new requests and are not closed yet.
        loads: Number of versions by outcome of loading, one of ``LOADS``.
        used: ``time.monotonic()`` of the last request.
        ended: Counters of all versions that are closed.
    """

    name: str
    path: Path | None = None
    model: ModelDescription | None = None
    current: ServedModel | None = None
    loading: Future[ServedModel] | None = None
    retired: list[ServedModel] = field(default_factory=list)
    loads: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(LOADS, 0)))
    used: float = field(default_factory=time.monotonic)
    ended: Snapshot = _NOTHING

    @property
    def versions(self) -> list[ServedModel]:
        """All versions that are loaded, the current one first."""
        return [*([] if self.current is None else [self.current]), *self.retired]

    @property
    def memory(self) -> int:
        """Estimated bytes of all versions that are loaded."""
        return sum(model.memory for model in self.versions)

    def end(self, model: ServedModel) -> None:
        """Remove a closed version from ``retired`` and add its counters to ``ended``."""
        self.retired.remove(model)
        done = replace(model.scheduler.snapshot(), ready=True, waiting=0, running=0, batch_fill=0.0, steps_per_second=0)
        self.ended = merged([self.ended, done])

    def snapshot(self) -> Snapshot:
        """Counters of all versions, and readiness of the current one. A bundle that is not loaded counts as ready."""
        snapshots = [model.scheduler.snapshot() for model in self.versions]
        if self.current is None:
            return merged([self.ended, *snapshots])
        return merged([*snapshots, self.ended])

    def state(self) -> BundleState:
        """State for the metrics."""
        loaded = self.current is not None
        return BundleState(self.name, loaded, len(self.versions), self.memory, dict(self.loads), self.snapshot())

    def facts(self) -> dict[str, Any]:
        """The entry of ``/v1/models``."""
        if (loaded := self.current) is not None:
            return loaded.facts()
        assert self.model is not None
        return model_facts(self.name, self.model, None)
