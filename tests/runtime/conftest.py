"""Batch schedulers of the shipped model: running ones, and ones whose UNet calls a test lets through one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from tests.support.step_gate import StepGate


@pytest.fixture(scope="module")
def pipeline(shapes_bundle: Path) -> Iterator[LatentDiffusionPipeline]:
    with LatentDiffusionPipeline.from_bundle(shapes_bundle, backend="onnxruntime", precision="fp32") as loaded:
        yield loaded


@pytest.fixture
def room(pipeline: LatentDiffusionPipeline) -> Iterator[BatchScheduler]:
    with BatchScheduler(pipeline) as open_room:
        yield open_room


@pytest.fixture
def gated(pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple]]:
    """Make a scheduler whose UNet calls wait at a ``StepGate``; arguments are ``Limits``, or its fields."""
    made: list[tuple[BatchScheduler, StepGate]] = []

    def make(limits: Limits | None = None, **fields) -> tuple[BatchScheduler, StepGate]:
        gate = StepGate(pipeline.backends["unet"].run)
        room = BatchScheduler(pipeline, limits or Limits(**fields))
        monkeypatch.setattr(pipeline.backends["unet"], "run", gate)
        made.append((room, gate))
        return room, gate

    yield make
    for room, gate in made:
        gate.open()
        room.close()
