"""The demo distribution's interface: its prompts, its grader and its metadata."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest

import ldm_export_demo as demo
from ldm_export_demo.drawing import arrange, draw
from ldm_export_demo.grammar import is_held_out, parse

ROOT = Path(__file__).parents[2]


def image_of(prompt: str) -> np.ndarray:
    return draw(arrange(parse(prompt), np.random.default_rng(0)))


def test_calibration_prompts_contain_no_trial_prompt() -> None:
    calibration, trials = demo.calibration_prompts(16), demo.trial_prompts(100)
    assert (len(calibration), len(set(trials))) == (16, 100)
    assert not any(is_held_out(parse(prompt)) for prompt in calibration)
    assert all(is_held_out(parse(prompt)) for prompt in trials)
    assert sum(len(parse(prompt).things) == 1 for prompt in trials) == 33
    assert calibration == demo.calibration_prompts(20)[:16]


def test_the_grader_decides_for_each_image_in_an_array_or_a_list() -> None:
    images = [image_of(prompt) for prompt in demo.PROMPTS]
    turned = [*demo.PROMPTS[1:], demo.PROMPTS[0]]
    for batch in (images, np.stack(images)):
        assert demo.grade(batch, demo.PROMPTS) == [True] * len(demo.PROMPTS)
        assert demo.grade(batch, turned) == [False] * len(demo.PROMPTS)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (np.zeros((1, 64, 64, 3), np.uint8), ["a photo of a cat"], "grammar"),
        (np.zeros((1, 32, 32, 3), np.uint8), ["a red circle"], r"got shape \[32, 32, 3\], expected \[64, 64, 3\]"),
        (np.zeros((1, 64, 64, 3), np.float32), ["a red circle"], "float32"),
        (np.zeros((2, 64, 64, 3), np.uint8), ["a red circle"], "got 2 for 1 prompts"),
    ],
)
def test_what_cannot_be_graded_is_refused(images: np.ndarray, prompts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.grade(images, prompts)


def test_both_distributions_have_the_same_version() -> None:
    projects = [tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"] for folder in (".", "demo")]
    assert projects[0]["version"] == projects[1]["version"]
    assert {line.partition(">")[0] for line in projects[1]["dependencies"]} == {"numpy", "pillow"}
