"""Engine rooms of the demo model: open ones, and ones whose steps stand at a gate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from tests.support.step_gate import Gate


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
    """Makes a room whose UNet calls stand at a gate, with one request of many steps running already."""
    rooms = []

    def make(**limits) -> tuple[BatchScheduler, Gate]:
        gate = Gate(pipeline.backends["unet"].run)
        room = BatchScheduler(pipeline, Limits(**limits))
        monkeypatch.setattr(pipeline.backends["unet"], "run", gate)
        rooms.append((room, gate))
        return room, gate

    yield make
    for room, gate in rooms:
        gate.open()
        room.close()
