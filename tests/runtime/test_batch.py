"""Members join and leave a batch at any step; each gets exactly the latents that its pipeline computes alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.batch import Batch
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.member import Member
from tests.support.numpy_model import SCHEDULERS, numpy_pipeline

MAX_ROWS = 16


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LatentDiffusionPipeline]:
    """Scheduler -> pipeline of the same model."""
    folder = tmp_path_factory.mktemp("model")
    return {name: numpy_pipeline(folder, scheduler=config) for name, config in SCHEDULERS.items()}


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@dataclass(frozen=True)
class Visit:
    """One member's stay: scheduler, request, steps of the batch before it asks to join, and steps it stays at most."""

    scheduler: str
    request: Request
    arrives: int
    stays: int


requests = st.builds(
    lambda prompt, images, seeds, **options: Request(
        prompt, images_per_prompt=images, seed=list(range(seeds, seeds + images)) if seeds % 2 else seeds, **options
    ),
    prompt=st.sampled_from(["a", "b c", "x y z"]),
    images=st.integers(1, 3),
    seeds=st.integers(0, 9),
    negative_prompt=st.sampled_from(["", "q"]),
    eta=st.sampled_from([0.0, 0.5]),
    guidance_scale=st.sampled_from([1.0, 2.5, 6.0]),
    num_inference_steps=st.integers(4, 9),
    guidance_every=st.integers(1, 3),
    guidance_rescale=st.sampled_from([0.0, 0.7]),
    guidance_interval=st.sampled_from([(0.0, 1.0), (0.2, 0.8), (0.5, 0.5)]),
    cache_every=st.sampled_from([1, 1, 2, 3]),
    full_steps=st.integers(0, 3),
)
visits = st.builds(
    Visit,
    st.sampled_from([*SCHEDULERS]),
    requests,
    st.integers(0, 6),
    st.sampled_from([2, 100, 100, 100]),
)


def alone(pipeline: LatentDiffusionPipeline, request: Request) -> list[np.ndarray]:
    return [step.latents for step in pipeline.steps(request)]


def join(pipeline: LatentDiffusionPipeline, batch: Batch, job: Job) -> None:
    start = pipeline.begin(job.plan)
    schedule = pipeline.denoiser.embed(job.plan.trajectory.timesteps)
    batch.join(job, pipeline.condition(job.plan, start), schedule, start)


@settings(max_examples=60)
@given(stays=st.lists(visits, min_size=1, max_size=7), padding=st.booleans())
def test_every_member_gets_the_latents_it_has_alone(
    pipelines: dict[str, LatentDiffusionPipeline], executor: ThreadPoolExecutor, stays: list[Visit], padding: bool
) -> None:
    limits = Limits(max_rows=MAX_ROWS, row_buckets=(2, 6, MAX_ROWS) if padding else None)
    batch, counters = Batch(pipelines["ddim"].denoiser, limits, executor), Counters(MAX_ROWS)
    waiting = sorted(stays, key=lambda visit: visit.arrives)
    running: list[tuple[Visit, Member]] = []
    done = ticks = 0
    while waiting or running:
        while waiting and waiting[0].arrives <= ticks:
            visit, pipeline = waiting[0], pipelines[waiting[0].scheduler]
            job = Job(pipeline.plan(visit.request))
            if not batch.fits(job):
                break
            join(pipeline, batch, job)
            running.append((waiting.pop(0), batch.members[-1]))
        if running:
            batch.step(counters)
        ticks += 1
        for visit, member in list(running):
            if member.done or member.index == visit.stays:
                expected = alone(pipelines[visit.scheduler], visit.request)[member.index - 1]
                np.testing.assert_array_equal(batch.leave(member), expected)
                running.remove((visit, member))
                done += 1
    assert done == len(stays) and batch.rows == 0 and not batch.members


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm_sde", "euler", "heun"])
def test_an_unconditional_model_keeps_its_members(tmp_path: Path, executor: ThreadPoolExecutor, scheduler: str) -> None:
    """Without conditioning tensors, a member that joins leaves the latents of the others alone."""
    pipeline = numpy_pipeline(tmp_path, text=False, scheduler=SCHEDULERS[scheduler])
    batch, counters = Batch(pipeline.denoiser, Limits(max_rows=8), executor), Counters(8)
    requests = [Request(count=2, seed=1, num_inference_steps=6), Request(seed=2, num_inference_steps=4)]
    for request in requests:
        job = Job(pipeline.plan(request))
        join(pipeline, batch, job)
        batch.step(counters)
    members = list(batch.members)
    while batch.members:
        for member in [member for member in batch.members if member.done]:
            expected = alone(pipeline, requests[members.index(member)])[-1]
            np.testing.assert_array_equal(batch.leave(member), expected)
        if batch.members:
            batch.step(counters)


def test_steps_that_evaluate_one_branch_take_only_its_rows(
    pipelines: dict[str, LatentDiffusionPipeline], executor: ThreadPoolExecutor
) -> None:
    pipeline = pipelines["ddim"]
    batch, counters = Batch(pipeline.denoiser, Limits(max_rows=8), executor), Counters(8)
    calls = pipeline.backends["unet"].calls  # type: ignore[attr-defined]
    calls.clear()
    for request in (
        Request("a", seed=0, num_inference_steps=6, guidance_scale=3.0, guidance_every=3),
        Request("b", seed=1, num_inference_steps=6, guidance_scale=3.0, guidance_interval=(0.5, 1.0)),
        Request("c", seed=2, num_inference_steps=6, guidance_scale=1.0),
    ):
        job = Job(pipeline.plan(request))
        join(pipeline, batch, job)
    assert batch.rows == 5
    for _ in range(6):
        batch.step(counters)
    assert [len(call["sample"]) for call in calls] == [4, 3, 3, 5, 4, 4] and counters.rows == 23
