"""Long prompts in chunks, and weights in prompts, against the package compel with diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compel import Compel
from compel.convenience_wrappers import CompelForSD, CompelForSDXL
from compel.prompt_parser import PromptParser
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ldm_export.cli import main
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.conditioning.prompt_weights import weighted_fragments
from ldm_runtime.errors import SpecError

LONG = "a red circle, the photo. " * 14
PROMPTS = [
    "a (red circle)1.3 photo, green-",
    f"a (red)0.5 circle (the photo)0.2. {LONG}",
    f"{LONG}(green square)0.6 (red)1.4 the end " * 3,
    "(and the " + "green a " * 60 + ")0.7",  # no sentence ends: split at a word, and the weight goes on in the next
]
NEGATIVE = ["", LONG, "a square-", "(photo)0"]
WORDS = ("red", "a", "it's", "well-known", "circle,", "the.", "é", "3")


@pytest.fixture
def pipe(sd2_bundle: Bundle) -> Iterator[LatentDiffusionPipeline]:
    """The pipeline of Stable Diffusion 2."""
    with LatentDiffusionPipeline.from_bundle(sd2_bundle, precision="fp32", backend="onnxruntime") as pipeline:
        yield pipeline


def reference(pipeline_class: Any, folder: Path) -> Any:
    """diffusers' pipeline of a checkpoint."""
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels(images: Any) -> NDArray[np.int64]:
    return np.stack([np.asarray(image, np.int64) for image in images])


def assert_same(pipe: LatentDiffusionPipeline, expected: Any, states: dict[str, Any], **request: Any) -> None:
    """Check that the images of a request are those of diffusers with the states of compel."""
    with torch.random.fork_rng(devices=[]):
        theirs = pixels(expected(generator=torch.manual_seed(3), num_inference_steps=3, **states).images)
    ours = pixels(pipe(seed=3, num_inference_steps=3, **request).images)
    assert ours.shape == theirs.shape and ours.std() > 10
    assert np.abs(ours - theirs).max() <= 1


def states_of(compel: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Arguments of diffusers' pipeline from what a wrapper of compel gives."""
    with torch.inference_mode():
        made = compel(*arguments, **options)
    states = {
        "prompt_embeds": made.embeds,
        "negative_prompt_embeds": made.negative_embeds,
        "pooled_prompt_embeds": made.pooled_embeds,
        "negative_pooled_prompt_embeds": made.negative_pooled_embeds,
    }
    return {name: value for name, value in states.items() if value is not None}


def test_images_equal_those_of_compel(pipe: LatentDiffusionPipeline, sd2_checkpoint: Path) -> None:
    expected = reference(StableDiffusionPipeline, sd2_checkpoint)
    compel = Compel(expected.tokenizer, expected.text_encoder, truncate_long_prompts=True)
    cut = {"prompt_embeds": compel(PROMPTS), "negative_prompt_embeds": compel(NEGATIVE)}
    assert_same(pipe, expected, cut, prompts=PROMPTS, negative_prompt=NEGATIVE, prompt_weights=True)
    whole = states_of(CompelForSD(expected), PROMPTS, NEGATIVE)
    assert whole["prompt_embeds"].shape[1] == 77 * 5
    texts: dict[str, Any] = {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "prompt_chunks": 8}
    assert_same(pipe, expected, whole, **texts, prompt_weights=True)
    plain = states_of(CompelForSD(expected), [LONG], [""])
    assert_same(pipe, expected, plain, prompts=[LONG], prompt_chunks=2)


def test_images_of_xl_equal_those_of_compel(xl_bundle: Bundle, xl_checkpoint: Path) -> None:
    expected = reference(StableDiffusionXLPipeline, xl_checkpoint)
    compel = CompelForSDXL(expected)
    texts: dict[str, Any] = {"prompts": PROMPTS, "negative_prompt": NEGATIVE, "prompt_chunks": 8}
    second: dict[str, Any] = {"prompts": "a (red)1.2", "prompts_2": LONG, "negative_prompt": "", "prompt_chunks": 3}
    with LatentDiffusionPipeline.from_bundle(xl_bundle, precision="fp32", backend="onnxruntime") as pipe:
        states = states_of(compel, PROMPTS, negative_prompt=NEGATIVE)
        assert_same(pipe, expected, states, **texts, prompt_weights=True)
        states = states_of(compel, ["a (red)1.2"], style_prompt=[LONG], negative_prompt=[""])
        assert_same(pipe, expected, states, **second, prompt_weights=True)
        zeros = pipe.plan(Request(LONG, prompt_chunks=3))
        rows = pipe.encode(zeros, pipe.begin(zeros))  # the unconditional branch has zeros for every token
        assert rows["context"].shape[:2] == rows["context_2"].shape[:2] == (2, 2 * 77)
        assert not rows["context"][0].any() and rows["context"][1, -77:].any()


def test_prompts_of_other_lengths_in_one_scheduler(pipe: LatentDiffusionPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 3, "prompt_chunks": 4, "prompt_weights": True}
    requests = [Request(prompt, seed=seed, **options) for seed, prompt in enumerate([*PROMPTS[:2], "a red circle"])]
    assert [pipe.plan(request).request.prompt_chunks for request in requests] == [1, 2, 1]
    alone = [pixels(pipe.decode([*pipe.steps(request)][-1].latents)) for request in requests]
    with BatchScheduler(pipe, Limits(max_rows=8)) as scheduler:
        jobs = [scheduler.submit(request) for request in requests]
        for job, image in zip(jobs, alone, strict=True):
            assert np.abs(job.result(60).images.astype(np.int64) - image).max() <= 1


def test_openvino_and_cached_features(sd2_bundle: Bundle, pipe: LatentDiffusionPipeline) -> None:
    request: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "prompt_chunks": 2, "cache_every": 2}
    with LatentDiffusionPipeline.from_bundle(sd2_bundle, precision="fp32", backend="openvino") as other:
        assert np.abs(pixels(other(LONG, **request).images) - pixels(pipe(LONG, **request).images)).max() <= 1


def test_options_that_do_not_fit(pipe: LatentDiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    for options, message in (
        ({"prompt_chunks": 9}, "prompt_chunks: got 9, but this bundle takes at most 8"),
        ({"prompt_weights": True, "prompts": "a (red"}, r"a '\(' is not closed in 'a \(red'"),
    ):
        with pytest.raises(SpecError, match=message):
            pipe.plan(Request(**{"prompts": "a", **options}))
    plan = pipe.plan(Request(PROMPTS[2], prompt_chunks=2, prompt_weights=True))
    pipe.encode(plan, pipe.begin(plan))
    assert "prompt: only " in caplog.text and "set prompt_chunks to more than 2" in caplog.text


def test_the_command_line(sd2_bundle: Bundle, tmp_path: Path) -> None:
    image, options = tmp_path / "out.png", ["--prompt-chunks", "3", "--prompt-weights", "--steps", "2", "--seed", "1"]
    assert main(["generate", str(sd2_bundle.folder), PROMPTS[1], *options, "-o", str(image)]) == 0
    assert image.is_file()


@st.composite
def prompts(draw: st.DrawFn, depth: int = 2) -> str:
    """Prompts in the syntax of compel."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        weight = draw(st.sampled_from(["", "+", "--", "0.5", "1.25", ".75", "2"]))
        inner = draw(prompts(depth - 1)) if depth and draw(st.booleans()) else draw(st.sampled_from(WORDS))
        sign = weight if weight[:1] in "+-" and inner.isalpha() else ""
        parts.append(draw(st.sampled_from([f"({inner}){weight}", f"{inner}{sign}", " ".join(WORDS[:3])])))
    return " ".join(parts)


PARSER = PromptParser()


@settings(max_examples=30, deadline=None)
@given(prompts())
def test_weights_are_read_as_by_compel(prompt: str) -> None:
    (parsed,) = PARSER.parse_conjunction(prompt).prompts
    theirs = [(one.text.replace(" ,", ",").replace(" .", ".").split(), one.weight) for one in parsed.children]
    ours = [(text.split(), weight) for text, weight in weighted_fragments(prompt)]
    assert [text for text, _ in ours] == [text for text, _ in theirs]
    assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in theirs])


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("", [("", 1)]),
        (" () ", [("", 1)]),
        ("a (big cat:1.3), b", [("a", 1), ("big cat", 1.3), (", b", 1)]),
        ("((a: 2) b:1.5)", [("a", 3), ("b", 1.5)]),
        (r"\(a\) \+ c\+ d:2", [("(a) + c+ d:2", 1)]),
        ("a)", None),
        ("(a)11", None),
        ("(a:1e3)", [("a:1e3", 1)]),
        ("(a, b).and()", None),
        ("a.swap(b)", None),
        ("(" * 200, None),
    ],
)
def test_weights(prompt: str, fragments: list[tuple[str, float]] | None) -> None:
    if fragments is None:
        with pytest.raises(SpecError, match=r"^prompt: "):
            weighted_fragments(prompt)
    else:
        assert list(weighted_fragments(prompt)) == fragments
