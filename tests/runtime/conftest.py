"""Batch schedulers of a small NumPy model: running ones, and ones whose UNet calls a test lets through one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from tests.support.numpy_model import numpy_pipeline
from tests.support.step_gate import StepGate


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionPipeline:
    return numpy_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def scheduler(pipeline: LatentDiffusionPipeline) -> Iterator[BatchScheduler]:
    with BatchScheduler(pipeline) as running:
        yield running


@pytest.fixture
def gated(pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple]]:
    """Make a scheduler whose UNet calls wait at a ``StepGate``; arguments are ``Limits``, or its fields."""
    opened: list[tuple[BatchScheduler, StepGate]] = []

    def make(limits: Limits | None = None, **fields) -> tuple[BatchScheduler, StepGate]:
        gate = StepGate(pipeline.backends["unet"].run)
        scheduler = BatchScheduler(pipeline, limits or Limits(**fields))
        monkeypatch.setattr(pipeline.backends["unet"], "run", gate)
        opened.append((scheduler, gate))
        return scheduler, gate

    yield make
    for scheduler, gate in opened:
        gate.open()
        scheduler.close()
