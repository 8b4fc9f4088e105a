"""The batch scheduler with a loop on a device: requests share batches there, and images are those of the pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching import device_batch
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import CancelledError, LdmError
from tests.runtime.test_batch_scheduler import MIXED, alone
from tests.runtime.test_device_loop import with_loop
from tests.support.waiting import wait_until

FOR_NUMPY = [request for request in MIXED if request.guidance_every > 1 or request.guidance_interval != (0.0, 1.0)]


@pytest.fixture(params=["ddim", "dpm_3", "euler_ancestral", "lms"])
def pipelines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[LatentDiffusionPipeline, ...]]:
    plain, looped = with_loop(tmp_path, request.param)
    with looped:  # closing the device fails if a tensor is left
        yield plain, looped


@pytest.mark.parametrize(
    ("limits", "calls"),
    [(Limits(), 3), (Limits(max_rows=8), 64), (Limits(max_rows=16, row_buckets=(4, 16)), 3)],
    ids=["usual", "8 rows", "buckets"],
)
def test_images_are_those_of_the_pipeline(pipelines, limits: Limits, calls: int, monkeypatch) -> None:
    monkeypatch.setattr(device_batch, "TABLE_CALLS", calls)
    plain, looped = pipelines
    with BatchScheduler(looped, limits) as scheduler:
        jobs = [scheduler.submit(request) for request in MIXED * 2]
        results = [job.result(120).images for job in jobs]
        snapshot = scheduler.snapshot()
    for result, request in zip(results, MIXED * 2, strict=True):
        expected = alone(plain, request)
        assert result.shape == expected.shape
        assert np.abs(result.astype(int) - expected.astype(int)).max() <= 1
    assert snapshot.steps < sum(len(plain.plan(request).trajectory) for request in MIXED * 2)
    steps = sum(len(plain.plan(request).trajectory) for request in FOR_NUMPY * 2)
    assert 0 < len(looped.backends["unet"].calls) <= steps


def test_progress_previews_and_cancelled_requests(pipelines) -> None:
    plain, looped = pipelines
    previews: dict[int, Any] = {}
    request = Request("a", seed=1, num_inference_steps=6, guidance_scale=6.0, eta=0.3)
    with BatchScheduler(looped, Limits(max_rows=8)) as scheduler:
        cancelled = scheduler.submit(Request("b", seed=2, num_inference_steps=500, guidance_scale=3.0))
        job = scheduler.submit(
            request, preview_every=2, on_progress=lambda progress: previews.update({progress.index: progress.preview})
        )
        result = job.result(60).images
        cancelled.cancel()
        with pytest.raises(CancelledError):
            cancelled.result(60)
    assert np.abs(result.astype(int) - alone(plain, request).astype(int)).max() <= 1
    assert list(previews) == list(range(6)) and [index for index, one in previews.items() if one is not None] == [1, 3]
    expected: dict[int, Any] = {}
    with BatchScheduler(plain, Limits(max_rows=8)) as scheduler:
        scheduler.submit(
            request, preview_every=2, on_progress=lambda progress: expected.update({progress.index: progress.preview})
        ).result(60)
    for index in (1, 3):
        assert np.abs(previews[index].astype(int) - expected[index].astype(int)).max() <= 1


def test_a_failed_call_ends_the_batch_and_the_next_one_runs(pipelines, monkeypatch) -> None:
    _, looped = pipelines
    with BatchScheduler(looped, Limits(max_rows=8)) as scheduler:
        launcher = looped.loop.open().launchers["unet"]
        prepare = type(launcher).prepare
        request = Request("a", seed=1, num_inference_steps=3, guidance_scale=6.0)

        def failing(*arguments: Any, **options: Any) -> Any:
            raise LdmError("the device is gone")

        monkeypatch.setattr(type(launcher), "prepare", failing)
        with pytest.raises(LdmError, match="the device is gone"):
            scheduler.submit(request).result(60)
        monkeypatch.setattr(type(launcher), "prepare", prepare)
        assert wait_until(lambda: scheduler.ready)
        assert scheduler.submit(request).result(60).images.shape == (1, 12, 12, 3)
