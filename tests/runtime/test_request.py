"""What is asked for is checked field by field, and becomes prompts, shapes and the noise torch would draw."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.errors import SpecError
from ldm_runtime.request import Geometry, Plan, Request, fresh_seed
from ldm_runtime.specs import Axis, TensorSpec

BATCH, HEIGHT, WIDTH = Axis("batch", 1, 1, 8), Axis("height", 2, 8, 16), Axis("width", 3, 6, 20)
GEOMETRY = Geometry(channels=4, height=HEIGHT, width=WIDTH, images=8, factor=8)
LATENTS = np.zeros((1, 4, 8, 6), np.float32)


def plan(prompts: Any = "a red circle", **options: Any) -> Plan:
    return Request(prompts, **options).plan(GEOMETRY)


def with_value(value: float) -> np.ndarray:
    array = LATENTS.copy()
    array[0, 3, 7, 5] = value
    return array


def test_the_geometry_is_the_decoders() -> None:
    latents = TensorSpec("latents", "float32", (BATCH, 4, HEIGHT, WIDTH))
    assert Geometry.of(latents, TensorSpec("image", "float32", (BATCH, 3, 8 * HEIGHT, 8 * WIDTH))) == GEOMETRY
    fixed = Geometry.of(TensorSpec("x", "float32", (2, 4, 8, 6)), TensorSpec("y", "float32", (2, 3, 32, 24)))
    assert (fixed.images, fixed.factor, fixed.height.admits(8), fixed.height.admits(9)) == (2, 4, True, False)
    with pytest.raises(SpecError, match="height: got 64, expected a multiple of 4 from 32 to 32 pixels"):
        Request("a", height=64).plan(fixed)


@pytest.mark.parametrize(
    ("latents", "image"), [((4, 8, 8), (1, 3, 64, 64)), ((1, 4, 8, 8), (1, 64)), ((1, 4, 8, 8), (1, 3, 4, 8))]
)
def test_a_decoder_of_another_form_is_refused(latents: tuple[int, ...], image: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match=r"^decoder: got x: float32 .* and y: float32 .*, expected \[images, channels"):
        Geometry.of(TensorSpec("x", "float32", latents), TensorSpec("y", "float32", image))


def test_defaults() -> None:
    made = plan()
    assert (made.rows, made.negative_rows, made.shape) == (("a red circle",), ("",), (1, 4, 8, 6))
    assert not made.guided and made.latents is None and len(made.seeds) == 1
    assert plan().seeds != made.seeds  # a fresh one each time


def test_prompts_negative_prompts_and_images_of_each_side_by_side() -> None:
    made = plan(["a", "b"], negative_prompt=["c", ""], images_per_prompt=2, guidance_scale=2, height=16, width=160)
    assert (made.rows, made.negative_rows) == (("a", "a", "b", "b"), ("c", "c", "", ""))
    assert made.shape == (4, 4, 2, 20) and made.guided and made.guidance_scale == 2.0
    assert plan(("a", "b"), negative_prompt="c").negative_rows == plan(["a", "b"], negative_prompt=["c"]).negative_rows
    assert plan(["a", "b"], negative_prompt="c").negative_rows == ("c", "c")


@pytest.mark.parametrize("scale", [0, 0.0, -3, 0.999, 1e30])
def test_every_scale_but_one_is_guided(scale: float) -> None:
    assert plan(guidance_scale=scale).guided
    assert not plan(guidance_scale=1).guided and not plan(guidance_scale=1.0).guided


ALONE: list[tuple[str, list[Any], str]] = [  # field, what it does not take, what it expects
    ("prompts", ["", " \n", [], ["a", ""]], "got an empty prompt, expected a text of at least one character"),
    ("prompts", [None, 5, b"a", {"a"}, ["a", 1], (p for p in "ab")], "expected a text or a list of texts"),
    ("negative_prompt", [None, 5, ["a", None], {"a": "b"}], "expected a text or a list of texts"),
    ("negative_prompt", [[]], "got 0 for 1 prompts, expected one, or one each"),
    ("images_per_prompt", [0, -1, 9, 1.0, True, "2", None], "expected a whole number from 1 to 8"),
    ("guidance_scale", [np.nan, np.inf, -np.inf, 1e39, 10**400, "6", None, True, 1j], "expected a finite number"),
    ("height", [0, -64, 63, 65, 7, 8, 136, 64.0, "64", True], "expected a multiple of 8 from 16 to 128 pixels"),
    ("width", [0, -64, 63, 65, 7, 16, 168, 64.0, "64", True], "expected a multiple of 8 from 24 to 160 pixels"),
    ("seed", [1.0, "1", True, 2**64, np.int64(1), [None]], "expected an integer from -2**63 to 2**64 - 1"),
    ("seed", [[], [1, 2], (1, 2, 3)], "seeds for 1 images, expected one number, or one per image"),
    ("latents", [LATENTS.tolist(), torch.zeros(1, 4, 8, 6), LATENTS[0]], "expected a float32 array [1, 4, 8, 6]"),
    ("latents", [LATENTS.astype(float), LATENTS.astype(">f4")], "[1, 4, 8, 6], expected a float32 array [1, 4, 8, 6]"),
    ("latents", [with_value(np.nan), with_value(np.inf)], "got NaN or infinite values, expected finite ones"),
]


@pytest.mark.parametrize(("name", "value", "said"), [(name, one, said) for name, many, said in ALONE for one in many])
def test_every_field_is_checked_and_named(name: str, value: Any, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan(**{"prompts": "a red circle", name: value})
    assert str(caught.value).startswith(f"{name}: got ")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negative_prompt": ["c"] * 2}, "negative_prompt: got 2 for 3 prompts, expected one, or one each"),
        ({"images_per_prompt": 3}, "prompts: got 9 images in one call, expected 1..8; make several calls"),
        ({"prompts": ["a"] * 9}, "prompts: got 9 images in one call, expected 1..8"),
        ({"seed": [1, 2]}, "seed: got 2 seeds for 3 images"),
        ({"seed": [1, 2, 3], "images_per_prompt": 2}, "seed: got 3 seeds for 6 images"),
        ({"latents": LATENTS}, "latents: got float32 [1, 4, 8, 6], expected a float32 array [3, 4, 8, 6]"),
        ({"prompts": "a", "latents": LATENTS, "height": 16}, "expected a float32 array [1, 4, 2, 6]"),
    ],
)
def test_fields_that_do_not_fit_each_other(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan(**{"prompts": ["a", "b", "c"], **options})
    assert said in str(caught.value)


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
def test_one_seed_is_one_stream_for_the_whole_batch(seed: int, images: int) -> None:
    made = plan(["a"] * images, seed=seed)
    assert equal(list(islice(made.noise(), 3)), torch_noise(seed, (images, 4, 8, 6), 3))
    assert equal(list(islice(made.noise(), 1)), torch_noise(seed, (images, 4, 8, 6), 1))  # begins anew each time


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4))
def test_a_list_of_seeds_gives_each_image_the_noise_it_has_alone(seeds: list[int]) -> None:
    together = list(islice(plan(["a"] * len(seeds), seed=seeds).noise(), 3))
    alone = [list(islice(plan(seed=seed).noise(), 3)) for seed in seeds]
    assert all(np.array_equal(batch, np.concatenate(rows)) for batch, *rows in zip(together, *alone, strict=True))


def test_a_fresh_seed_is_one_that_can_be_given_again() -> None:
    seeds = {fresh_seed() for _ in range(20)}
    assert len(seeds) == 20 and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    (seed,) = plan().seeds
    assert plan(seed=seed).seeds == (seed,)


def test_with_latents_given_the_first_noise_is_the_first_steps(tiny_bundle: Path) -> None:
    with LatentDiffusionPipeline.from_bundle(tiny_bundle, precision="fp32", threads=1) as pipeline:
        latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
        given_latents = latents.copy()
        first, second = pipeline.steps(Request("a circle", latents=latents, seed=7, eta=1.0, num_inference_steps=2))
        context = pipeline.backends["text_encoder"].run({"input_ids": pipeline.tokenizer(["a circle"])})["context"]
        schedule, x_t = pipeline.scheduler.schedule(2, 1.0), latents
        for step, noise in zip((first, second), torch_noise(7, latents.shape, 2), strict=True):
            timestep = np.array([step.timestep])
            eps = pipeline.backends["unet"].run({"sample": x_t, "timestep": timestep, "context": context})["noise_pred"]
            x_t = schedule.step(x_t, eps, step.index, noise)
            assert np.abs(x_t - step.latents).max() < 1e-4
        assert np.array_equal(latents, given_latents)  # the caller's array is left alone
