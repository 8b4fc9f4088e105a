"""The same seed gives the same image as diffusers' own pipeline: the demo model, at most 1/255 anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LDMTextToImagePipeline

from ldm_export.demo import demo_checkpoint
from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.errors import SpecError

PROMPTS = [
    "a large red circle in the center on a white background",
    "a small blue triangle left of a large yellow cross on a gray background",
    "a small green square above a large purple square on a black background",
]


@pytest.fixture(scope="module")
def theirs() -> LDMTextToImagePipeline:
    pipeline = DiffusionPipeline.from_pretrained(demo_checkpoint())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Iterator[LatentDiffusionPipeline]:
    with LatentDiffusionPipeline.from_bundle(shapes_bundle, precision="fp32") as pipeline:
        yield pipeline


def reference(pipeline: LDMTextToImagePipeline, prompts: list[str], seed: int, **options) -> np.ndarray:
    images = pipeline(prompts, generator=torch.manual_seed(seed), **options).images
    return np.stack([np.asarray(image) for image in images])


def first_image(pipeline: LatentDiffusionPipeline, prompts: list[str], **options) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipeline(prompts, **options).images])


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    assert one.shape == other.shape and one.dtype == other.dtype == np.uint8
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert one.std() > 5  # a flat image would agree with anything flat


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("steps", "seed"), [(1, 0), (7, 42), (2, 2**40 + 1)])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_same_image(ours, theirs, eta: float, guidance: float, steps: int, seed: int, count: int) -> None:
    options = {"eta": eta, "guidance_scale": guidance, "num_inference_steps": steps}
    expected = reference(theirs, PROMPTS[:count], seed, **options)
    assert_same(first_image(ours, PROMPTS[:count], seed=seed, **options), expected)


def test_same_image_of_50_steps(ours, theirs) -> None:
    options = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 50}
    assert_same(first_image(ours, PROMPTS, seed=42, **options), reference(theirs, PROMPTS, 42, **options))


@pytest.mark.parametrize(("height", "width"), [(64, 128), (72, 88), (128, 64)])
def test_same_image_of_other_sizes(ours, theirs, height: int, width: int) -> None:
    options = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 7, "height": height, "width": width}
    assert_same(first_image(ours, PROMPTS, seed=5, **options), reference(theirs, PROMPTS, 5, **options))


def test_same_image_from_given_latents(ours, theirs) -> None:
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 8)).astype(np.float32)
    options = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 7}
    expected = reference(theirs, PROMPTS, 9, latents=torch.from_numpy(latents.copy()), **options)
    assert_same(first_image(ours, PROMPTS, seed=9, latents=latents, **options), expected)


def test_a_list_of_seeds_gives_each_image_its_own_result(ours, theirs) -> None:
    options = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 7}
    expected = [reference(theirs, [prompt], seed, **options) for prompt, seed in zip(PROMPTS, (3, 1, 4), strict=True)]
    assert_same(first_image(ours, PROMPTS, seed=[3, 1, 4], **options), np.concatenate(expected))


def test_images_per_prompt_are_the_prompt_repeated(ours, theirs) -> None:
    options = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 7}
    repeated = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    ours_twice = first_image(ours, PROMPTS[:2], images_per_prompt=2, seed=8, **options)
    assert_same(ours_twice, reference(theirs, repeated, 8, **options))


def test_a_negative_prompt_takes_the_place_of_the_empty_one(ours) -> None:
    options = {"seed": 1, "guidance_scale": 6.0, "num_inference_steps": 7}
    plain = first_image(ours, PROMPTS[:1], **options)
    assert np.array_equal(first_image(ours, PROMPTS[:1], negative_prompt="", **options), plain)
    away = first_image(ours, PROMPTS[:1], negative_prompt="a large red circle", **options)
    assert np.abs(away.astype(int) - plain.astype(int)).max() > 30


def test_without_guidance_the_unguided_branch_is_not_computed(ours, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    run = ours.backends["unet"].run
    monkeypatch.setattr(ours.backends["unet"], "run", lambda feed: rows.append(len(feed["sample"])) or run(feed))
    ours(PROMPTS, guidance_scale=1.0, num_inference_steps=2, seed=0)
    ours(PROMPTS, guidance_scale=1.5, num_inference_steps=2, seed=0)
    assert rows == [3, 3, 6, 6]


def test_guidance_between_two_shares_of_the_steps(ours, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    run = ours.backends["unet"].run
    options = {"guidance_scale": 6.0, "num_inference_steps": 10, "seed": 0}
    whole = first_image(ours, PROMPTS[:1], **options)
    assert np.array_equal(first_image(ours, PROMPTS[:1], guidance_interval=(0.0, 1.0), **options), whole)
    none = first_image(ours, PROMPTS[:1], guidance_interval=(0.3, 0.3), **options)
    assert_same(none, first_image(ours, PROMPTS[:1], **options | {"guidance_scale": 1.0}))
    monkeypatch.setattr(ours.backends["unet"], "run", lambda feed: rows.append(len(feed["sample"])) or run(feed))
    some = first_image(ours, PROMPTS[:1], guidance_interval=(0.2, 0.7), **options)
    assert rows == [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]
    assert not np.array_equal(some, whole) and not np.array_equal(some, none)
    for wrong in ((0.5, 0.2), (-0.1, 1), (0, 1.5), (0,), ("0", 1), float("nan")):
        with pytest.raises(SpecError, match="guidance_interval: got"):
            ours.steps(Request(PROMPTS[:1], guidance_interval=wrong))


def reused_by_hand(ours, every: int, steps: int) -> np.ndarray:
    plan = ours.plan(Request(PROMPTS[:1], seed=0, guidance_scale=6.0, eta=0.0, num_inference_steps=steps))
    conditioning = ours.condition(plan, ours.begin(plan))
    prompted_only = {name: rows[1:] for name, rows in conditioning.items()}
    state = plan.start(plan.noise())
    for index, timestep in enumerate(plan.trajectory.timesteps):
        times = np.full(2, timestep, np.int64)
        if index % every:
            prompted = ours.denoiser(state[0], ours.denoiser.embed(times[:1]), prompted_only)
        else:
            both = ours.denoiser(state[0].repeat(2, 0), ours.denoiser.embed(times), conditioning)
            direction, prompted = both[1:] - both[:1], both[1:]
        state = plan.trajectory.step(state, prompted + np.float32(5) * direction, index)
    return np.asarray(ours.decode(state[0])[0])


def test_guidance_reused_between_steps(ours, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    run = ours.backends["unet"].run
    options = {"guidance_scale": 6.0, "num_inference_steps": 10, "seed": 0, "eta": 0.0}
    whole = first_image(ours, PROMPTS[:1], **options)
    assert np.array_equal(first_image(ours, PROMPTS[:1], guidance_every=1, **options), whole)
    monkeypatch.setattr(ours.backends["unet"], "run", lambda feed: rows.append(len(feed["sample"])) or run(feed))
    reused = first_image(ours, PROMPTS[:1], guidance_every=3, **options)
    assert rows == [2, 1, 1, 2, 1, 1, 2, 1, 1, 2]
    rows.clear()
    first_image(ours, PROMPTS[:1], guidance_every=2, guidance_interval=(0.3, 0.8), **options)
    assert rows == [1, 1, 1, 2, 1, 2, 1, 2, 1, 1]
    unguided = first_image(ours, PROMPTS[:1], **options | {"guidance_scale": 1.0})
    assert_same(reused, reused_by_hand(ours, 3, 10)[None])
    np.testing.assert_array_equal(
        first_image(ours, PROMPTS[:1], guidance_every=3, **options | {"guidance_scale": 1.0}), unguided
    )
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(SpecError, match="guidance_every: got"):
            ours.steps(Request(PROMPTS[:1], guidance_every=wrong))


def test_steps_are_the_callers_to_count_and_to_stop(ours) -> None:
    request = Request(PROMPTS[:1], seed=0, num_inference_steps=5)
    steps = ours.steps(request)
    first = next(steps)
    assert (first.index, first.total, first.timestep) == (0, 5, 800)
    steps.close()
    output = []
    whole = ours(PROMPTS[:1], seed=0, num_inference_steps=5, on_progress=output.append)
    assert [step.index for step in output] == [0, 1, 2, 3, 4]
    assert np.array_equal(output[0].latents, first.latents) and np.array_equal(output[-1].latents, whole.latents)
    assert np.array_equal(np.asarray(ours.decode(whole.latents)[0]), np.asarray(whole.images[0]))
