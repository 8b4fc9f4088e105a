"""UNet calls that reuse deep features: which they are, and what they are given, in the pipeline and in batches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.batching.batch import Batch
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job
from ldm_runtime.batching.limits import Limits
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import check_model
from ldm_runtime.specs import TensorSpec
from tests.support.numpy_model import SCHEDULERS, description, numpy_pipeline

OPTIONS: dict[str, Any] = {"seed": 0, "guidance_scale": 3.0, "num_inference_steps": 10}


@pytest.fixture
def pipeline(tmp_path: Path) -> LatentDiffusionPipeline:
    return numpy_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ({}, range(10)),
        ({"cache_every": 1, "full_steps": 3}, range(10)),
        ({"cache_every": 3}, [0, 3, 6, 9]),
        ({"cache_every": 3, "full_steps": 0}, [0, 3, 6, 9]),
        ({"cache_every": 3, "full_steps": 4}, [0, 1, 2, 3, 6, 9]),
        ({"cache_every": 4, "num_inference_steps": 20}, [0, 1, 5, 9, 13, 17]),
        ({"full_steps": [4, 1]}, [0, 1, 4]),
        ({"full_steps": np.array([9])}, [0, 9]),
        ({"cache_every": 5, "full_steps": 0, "guidance_interval": (0.3, 0.8)}, [0, 3, 8]),
        ({"cache_every": 5, "full_steps": 0, "guidance_interval": (0.3, 0.8), "guidance_scale": 1.0}, [0, 5]),
        ({"cache_every": 100}, [0]),
        ({"cache_every": 3, "full_steps": 0, "guidance_every": 3}, [0, 3, 6, 9]),
        ({"cache_every": 3, "full_steps": 2, "guidance_every": 3}, [0, 1, 3, 6, 9]),
        ({"cache_every": 3, "full_steps": 0, "guidance_every": 2}, [0, 4, 8]),
        ({"cache_every": 2, "full_steps": 0, "guidance_every": 4, "num_inference_steps": 12}, [0, 4, 8, 10]),
        ({"cache_every": 2, "full_steps": 0, "guidance_every": 2, "guidance_interval": (0, 0.5)}, [0, 2, 4, 6, 8]),
        ({"full_steps": [1, 5], "guidance_every": 2}, [0, 1, 5]),
        ({"full_steps": [9], "guidance_interval": (0.2, 0.5)}, [0, 2, 9]),
        ({"cache_every": 1, "guidance_every": 3}, range(10)),
    ],
)
def test_calls_of_the_whole_unet(pipeline: LatentDiffusionPipeline, options: dict[str, Any], whole: Any) -> None:
    plan = pipeline.plan(Request("a", **OPTIONS | options))
    assert [index for index, shallow in enumerate(plan.shallow) if not shallow] == [*whole]
    assert plan.caches == any(plan.shallow) and len(plan.shallow) == len(plan.trajectory)


def test_calls_and_not_steps_are_counted(tmp_path: Path) -> None:
    pipeline = numpy_pipeline(tmp_path, scheduler=SCHEDULERS["heun"])
    plan = pipeline.plan(Request("a", **OPTIONS | {"num_inference_steps": 4, "cache_every": 2, "full_steps": 0}))
    assert plan.shallow == (False, True) * 3 + (False,)


def test_each_branch_gets_the_features_of_its_last_whole_call(
    pipeline: LatentDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned, given = list[np.ndarray](), list[np.ndarray]()
    run, run_shallow = (pipeline.backends[name].run for name in ("unet", "shallow_unet"))

    def remember(feed: Any) -> Any:
        results = run(feed)
        returned.append(results["deep_features"])
        return results

    def remember_given(feed: Any) -> Any:
        given.append(feed["deep_features"].copy())
        return run_shallow(feed)

    monkeypatch.setattr(pipeline.backends["unet"], "run", remember)
    monkeypatch.setattr(pipeline.backends["shallow_unet"], "run", remember_given)
    request = Request("a", negative_prompt="b", full_steps=[3, 6, 9], guidance_every=2, **OPTIONS)
    (*_, cached) = pipeline.steps(request)
    # calls: 0 both, whole; 1; 2 both; 3 conditional, whole; 4 both; 5; 6 both, whole; 7; 8 both; 9 conditional, whole
    assert [len(rows) for rows in returned] == [2, 1, 2, 1] and [len(rows) for rows in given] == [1, 2, 2, 1, 1, 2]
    first, second, third, _ = returned
    mixed = np.concatenate([first[:1], second])
    for found, expected in zip(given, (first[1:], first, mixed, second, third[1:], third), strict=True):
        assert np.array_equal(found, expected)
    (*_, exact) = pipeline.steps(replace(request, full_steps=None))
    assert not np.array_equal(exact.latents, cached.latents)


def test_a_step_that_computes_everything_is_the_step_without_caching(pipeline: LatentDiffusionPipeline) -> None:
    plain, one = (list(pipeline.steps(Request("a", **OPTIONS, **more))) for more in ({}, {"cache_every": 1}))
    assert np.array_equal(plain[-1].latents, one[-1].latents)
    assert not pipeline.backends["shallow_unet"].calls  # type: ignore[attr-defined]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.mark.parametrize("buckets", [None, (4, 8)])
def test_a_batch_makes_one_call_of_each_kind_for_members_in_different_phases(
    pipeline: LatentDiffusionPipeline, executor: ThreadPoolExecutor, buckets: tuple[int, ...] | None
) -> None:
    batch, counters = Batch(pipeline.denoiser, Limits(max_rows=8, row_buckets=buckets), executor), Counters(8)
    rows: dict[str, list[int]] = {}
    for name in ("unet", "shallow_unet"):
        pipeline.backends[name].calls.clear()  # type: ignore[attr-defined]
    for options in (
        {},
        {"cache_every": 2, "full_steps": 0},
        {"cache_every": 5, "full_steps": 2, "guidance_scale": 1.0},
    ):
        job = Job(pipeline.plan(Request("a", **OPTIONS | options)))
        start = pipeline.begin(job.plan)
        schedule = pipeline.denoiser.embed(job.plan.trajectory.timesteps)
        batch.join(job, pipeline.condition(job.plan, start), schedule, start)
    for _ in range(5):
        batch.step(counters)
    assert [member.index for member in batch.members] == [5, 5, 5]
    for name in ("unet", "shallow_unet"):
        rows[name] = [len(call["sample"]) for call in pipeline.backends[name].calls]  # type: ignore[attr-defined]
    padded = {None: lambda used: used, (4, 8): lambda used: 4 if used <= 4 else 8}[buckets]
    assert rows["unet"] == [padded(used) for used in (5, 3, 4, 2, 4)]
    assert rows["shallow_unet"] == [padded(used) for used in (2, 1, 3, 1)]
    assert (counters.steps, counters.rows) == (9, 25)


def test_a_bundle_without_a_shallow_unet_says_how_to_build_one(pipeline: LatentDiffusionPipeline) -> None:
    components = {name: spec for name, spec in pipeline.model.components.items() if name != "shallow_unet"}
    planner = replace(pipeline._planner, model=replace(pipeline.model, components=components))
    for options, got in (({"cache_every": 3}, "cache_every: got 3"), ({"full_steps": [0]}, "full_steps: got [0]")):
        with pytest.raises(SpecError) as refused:
            planner.plan(Request("a", **OPTIONS | options))
        assert str(refused.value).startswith(f"{got}, but this bundle has no shallow_unet")
        assert "`ldm-export build CHECKPOINT -o BUNDLE --feature-cache 1`" in str(refused.value)
    assert not planner.plan(Request("a", **OPTIONS | {"cache_every": 1})).caches


def test_a_shallow_unet_takes_what_its_unet_takes_and_returns() -> None:
    model = description()
    check_model(model)
    shallow, unet = model.components["shallow_unet"], model.components["unet"]
    other = TensorSpec("other", "float32", unet.inputs[0].shape)
    for changed, message in (
        ({"unet": replace(unet, outputs=unet.outputs[:1])}, "unet: outputs: got"),
        ({"shallow_unet": replace(shallow, inputs=shallow.inputs[:-1])}, "shallow_unet: got"),
        ({"shallow_unet": replace(shallow, outputs=(other,))}, "shallow_unet: got"),
        ({"shallow_unet": replace(shallow, inputs=(*shallow.inputs, other))}, "input 'other' comes from nowhere"),
        (
            {"shallow_unet": replace(shallow, inputs=(replace(shallow.inputs[0], dtype="int32"), *shallow.inputs[1:]))},
            "shallow_unet: input sample: int32 [batch, 4, height, width] is none of the UNet's",
        ),
    ):
        with pytest.raises(ManifestError, match=re.escape(message)):
            check_model(replace(model, components=dict(model.components) | changed))
    without = {name: spec for name, spec in model.components.items() if name != "shallow_unet"}
    with pytest.raises(ManifestError, match="expected noise_pred as float32"):
        check_model(replace(model, components=without))
    check_model(replace(model, components=without | {"unet": replace(unet, outputs=unet.outputs[:1])}))
