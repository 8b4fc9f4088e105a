"""A request is checked field by field, and its plan has the shapes, branches and noise that diffusers would use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.errors import SpecError
from ldm_runtime.geometry import Geometry
from ldm_runtime.guidance import StepBranches
from ldm_runtime.model import Latents
from ldm_runtime.plan import Plan
from ldm_runtime.request import fresh_seed
from ldm_runtime.specs import TensorSpec

LATENTS = np.zeros((1, 4, 8, 8), np.float32)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[LatentDiffusionPipeline]:
    with LatentDiffusionPipeline.from_bundle(tiny_bundle, precision="fp32", backend="onnxruntime", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def plan(pipeline: LatentDiffusionPipeline) -> Callable[..., Plan]:
    """Plans a request of the tiny model: latents of 4 channels and 8x8, sides 2..128, at most 32 images."""

    def make(prompts: Any = "a red circle", **options: Any) -> Plan:
        return pipeline.plan(Request(prompts, **options))

    return make


def with_value(value: float) -> np.ndarray:
    array = LATENTS.copy()
    array[0, 3, 7, 5] = value
    return array


def test_the_geometry_is_that_of_the_specs(pipeline: LatentDiffusionPipeline) -> None:
    geometry = pipeline.geometry
    assert (geometry.channels, geometry.images, geometry.factor, geometry.image_channels) == (4, 32, 8, 3)
    components = dict(pipeline.model.components)
    shape = (2, 4, 8, 6)
    components["unet"] = replace(components["unet"], inputs=(TensorSpec("sample", "float32", shape),))
    components["decoder"] = replace(
        components["decoder"],
        inputs=(TensorSpec("latents", "float32", shape),),
        outputs=(TensorSpec("image", "float32", (2, 1, 32, 24)),),
    )
    fixed = Geometry.of(replace(pipeline.model, components=components, latents=Latents(4, 4)))
    assert (fixed.images, fixed.factor, fixed.image_channels) == (1, 4, 1)  # a guided image takes both rows
    assert fixed.latents_of("height", None) == 8 and fixed.latents_of("width", np.int64(24)) == 6
    with pytest.raises(SpecError, match="height: got 64, expected a multiple of 4 from 32 to 32 pixels"):
        fixed.latents_of("height", 64)


def test_fields_left_out_take_the_models_defaults(plan: Callable[..., Plan]) -> None:
    planned = plan()
    assert (planned.shape, planned.guidance_scale, len(planned.trajectory)) == ((1, 4, 8, 8), 6.0, 50)
    assert planned.trajectory.needs_noise and planned.branches == ("unconditional", "conditional")
    assert planned.latents is None and len(planned.seeds) == 1
    assert plan().seeds != planned.seeds  # a fresh one each time


def test_images_of_a_prompt_lie_side_by_side(plan: Callable[..., Plan], pipeline: LatentDiffusionPipeline) -> None:
    planned = plan(["a", "b"], negative_prompt=["c", ""], images_per_prompt=2, height=16, width=160)
    assert planned.shape == (4, 4, 2, 20) and planned.guided and planned.rows == 8
    (conditioner,) = pipeline.conditioners
    states = {text: conditioner.rows(plan(text).request, "conditional") for text in ("a", "b", "c", "")}
    for branch, texts in (("conditional", "aabb"), ("unconditional", ["c", "c", "", ""])):
        (rows,) = conditioner.rows(planned.request, branch).values()
        assert np.array_equal(rows, np.concatenate([states[text]["context"] for text in texts]))


@pytest.mark.parametrize("scale", [0, 0.0, -3, 0.999, 1e30])
def test_every_scale_but_one_is_guided(plan: Callable[..., Plan], scale: float) -> None:
    assert plan(guidance_scale=scale).guided
    unguided = plan(guidance_scale=1, num_inference_steps=3)
    assert unguided.branches == ("conditional",) and unguided.steps == (StepBranches.CONDITIONAL,) * 3
    assert not plan(guidance_scale=np.float32(1.0)).guided


def test_guidance_on_a_part_of_the_steps(plan: Callable[..., Plan]) -> None:
    planned = plan(num_inference_steps=6, guidance_interval=(0.0, 0.5), guidance_every=2)
    both, reused, off = StepBranches.BOTH, StepBranches.REUSED, StepBranches.CONDITIONAL
    assert planned.steps == (both, reused, both, off, off, off)


def test_only_scales_above_one_are_guided_where_the_model_says_so(pipeline: LatentDiffusionPipeline) -> None:
    planner = replace(pipeline._planner, model=replace(pipeline.model, guidance_above_one=True))
    for scale, guided in ((0.0, False), (0.5, False), (1.0, False), (1.01, True)):
        planned = planner.plan(Request("a", guidance_scale=scale, guidance_rescale=0.5))
        assert (planned.guided, planned.guidance_rescale) == (guided, 0.5 if guided else 0.0)


ALONE: list[tuple[str, list[Any], str]] = [  # field, what it does not take, what it expects
    ("prompts", [[], ()], "got an empty list, expected a text or a list of texts"),
    ("prompts", [None], "got none, expected a text or a list of texts"),
    ("prompts", [5, b"a", {"a"}, ["a", 1], (p for p in "ab")], "expected a text or a list of texts"),
    ("negative_prompt", [5, ["a", None], {"a": "b"}], "expected a text or a list of texts"),
    ("guidance_rescale", [-0.1, 1.5, float("nan"), "1", None, True], "expected a number from 0 to 1"),
    ("clip_skip", [-1, 1.0, "1", None, True, 10**6], "expected a whole number from 0 to 4096"),
    ("clip_skip", [1, 12], "but this text encoder can skip 0 layers"),
    ("prompt_chunks", [0, -1, 1.0, "1", None, True, 10**6], "expected a whole number from 1 to 4096"),
    ("prompt_chunks", [2], "but this bundle's text encoder takes no attention mask"),
    ("prompt_weights", [0, 1, "yes", None], "expected True or False"),
    ("prompt_weights", [True], "but this bundle's text encoder takes no attention mask"),
    ("negative_prompt", [[]], "got 0 for 1 prompts, expected one, or one each"),
    ("images_per_prompt", [0, -1, 1.0, True, "2", None], "expected a whole number from 1 to 4096"),
    ("guidance_scale", [np.nan, np.inf, -np.inf, 1e39, 10**400, "6", True, 1j], "expected a finite number"),
    ("eta", [np.nan, -1, "0", True], "expected a finite number >= 0"),
    ("num_inference_steps", [0, -1, 1001, 10**5000, 2.0, "5", True], "expected 1..1000"),
    ("guidance_every", [0, -1, 1.0, None, "2"], "expected a whole number from 1 to 1000"),
    ("cache_every", [0, -1, 1.0, None, "2", 1001], "expected a whole number from 1 to 1000"),
    ("full_steps", [-1, 1.5, "2", True, 1001], "expected a whole number from 0 to 1000"),
    ("full_steps", [[-1], [50], ["a"], (0, 1.0), [[1], [2]]], "expected a whole number from 0 to 49"),
    ("guidance_interval", [None, (0,), (0.5, 0.2), (-1, 1), ("a", 1)], ""),
    ("height", [0, -64, 63, 65, 7, 8, 1032, 64.0, "64", True], "expected a multiple of 8 from 16 to 1024 pixels"),
    (
        "width",
        [0, -64, 63, 65, 7, 8, 1032, 10**5000, 64.0, "64", True],
        "expected a multiple of 8 from 16 to 1024 pixels",
    ),
    ("seed", [1.0, "1", True, 2**64, 10**5000, [None], [[1, [2]]]], "expected an integer from -2**63 to 2**64 - 1"),
    ("seed", [[], [1, 2], (1, 2, 3)], "seeds for 1 images, expected one number, or one per image"),
    ("latents", [LATENTS.tolist(), torch.zeros(1, 4, 8, 8), LATENTS[0]], "expected a float32 array [1, 4, 8, 8]"),
    ("latents", [LATENTS.astype(float), LATENTS.astype(">f4")], "[1, 4, 8, 8], expected a float32 array [1, 4, 8, 8]"),
    ("latents", [with_value(np.nan), with_value(np.inf)], "got NaN or infinite values, expected finite ones"),
]


CASES = [(name, one, message) for name, many, message in ALONE for one in many]


@pytest.mark.parametrize(("name", "value", "message"), CASES, ids=[f"{i} {name}" for i, (name, *_) in enumerate(CASES)])
def test_every_field_is_checked_and_named(plan: Callable[..., Plan], name: str, value: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan(**{"prompts": "a red circle", name: value})
    where = {"num_inference_steps": "steps"}.get(name, name)
    assert str(caught.value).startswith(f"{where}: got ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": ["c"] * 2}, "negative_prompt: got 2 for 3 prompts, expected one, or one each"),
        ({"images_per_prompt": 11}, "images: got 33 in one call, expected 1..32; make several calls"),
        ({"prompts": ["a"] * 33}, "images: got 33 in one call, expected 1..32"),
        ({"cache_every": 3, "full_steps": [0, 2]}, "full_steps: got a list beside cache_every 3"),
        ({"count": 3}, "count: got a number, but this model's conditioning decides"),
        ({"seed": [1, 2]}, "seed: got 2 seeds for 3 images"),
        ({"seed": [1, 2, 3], "images_per_prompt": 2}, "seed: got 3 seeds for 6 images"),
        ({"latents": LATENTS}, "latents: got float32 [1, 4, 8, 8], expected a float32 array [3, 4, 8, 8]"),
        ({"prompts": "a", "latents": LATENTS, "height": 16}, "expected a float32 array [1, 4, 2, 8]"),
    ],
)
def test_fields_that_do_not_fit_each_other(plan: Callable[..., Plan], options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan(**{"prompts": ["a", "b", "c"], **options})
    assert message in str(caught.value)


def torch_noise(seed: int, shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for _ in range(count)]


def equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    """Within the distance of torch's two ways to draw from each other; the noise's own tests are bit for bit."""
    return len(ours) == len(theirs) and all(
        one.dtype == np.float32 and one.shape == other.shape and np.abs(one - other).max() < 3e-6
        for one, other in zip(ours, theirs, strict=True)
    )


@given(st.integers(0, 2**64 - 1), st.integers(1, 4))
def test_one_seed_is_one_stream_for_the_whole_batch(plan: Callable[..., Plan], seed: int, images: int) -> None:
    planned = plan(["a"] * images, seed=seed)
    assert equal(list(islice(planned.noise(), 3)), torch_noise(seed, (images, 4, 8, 8), 3))
    assert equal(list(islice(planned.noise(), 1)), torch_noise(seed, (images, 4, 8, 8), 1))  # begins anew each time


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_a_list_of_seeds_gives_each_image_the_noise_it_has_alone(plan: Callable[..., Plan], seeds: list[int]) -> None:
    together = list(islice(plan(["a"] * len(seeds), seed=seeds).noise(), 3))
    alone = [list(islice(plan(seed=seed).noise(), 3)) for seed in seeds]
    assert all(np.array_equal(batch, np.concatenate(rows)) for batch, *rows in zip(together, *alone, strict=True))


def test_a_fresh_seed_is_one_that_can_be_given_again(plan: Callable[..., Plan]) -> None:
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20 and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    (seed,) = plan().seeds
    assert plan(seed=seed).seeds == (seed,)


def test_with_latents_given_the_first_noise_is_the_first_steps(pipeline: LatentDiffusionPipeline) -> None:
    latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    copy = latents.copy()
    request = Request("a circle", latents=latents, seed=7, eta=1.0, guidance_scale=1.0, num_inference_steps=2)
    plan, denoiser = pipeline.plan(request), pipeline.denoiser
    conditioning, embedded = pipeline.condition(plan, pipeline.begin(plan)), denoiser.embed(plan.trajectory.timesteps)
    state = plan.trajectory.start(latents)
    for step, noise in zip(pipeline.steps(request), torch_noise(7, latents.shape, 2), strict=True):
        row = {name: array[step.index : step.index + 1] for name, array in embedded.items()}
        state = plan.trajectory.step(state, denoiser(state[0], row, conditioning), step.index, noise)
        assert np.abs(state[0] - step.latents).max() < 1e-4
    assert np.array_equal(latents, copy)  # the caller's array is not changed
