"""How requests become calls, and which settings are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ldm_calibration.model import CalibrationModel
from ldm_calibration.settings import CalibrationSettings, check_grade
from ldm_runtime.errors import SpecError

CIRCLE, SQUARE = {"prompts": "a red circle"}, {"prompts": "a blue square"}


def test_requests_that_differ_in_their_prompts_alone_share_a_call(text: CalibrationModel) -> None:
    assert text.batch_size() == 4
    wide = {**CIRCLE, "width": 32}
    batches = text.batches([CIRCLE, SQUARE, CIRCLE, SQUARE, CIRCLE, wide, wide])
    assert [batch.indices for batch in batches] == [(0, 1, 2, 3), (4,), (5, 6)]
    assert batches[0].fields == {"prompts": [CIRCLE["prompts"], SQUARE["prompts"]] * 2}
    assert batches[2].fields == {"width": 32, "prompts": [CIRCLE["prompts"]] * 2}
    assert batches[2].request(1000, eta=0.5).seed == [1005, 1006]


def test_requests_of_an_unconditional_model_are_counted(unconditional: CalibrationModel) -> None:
    batches = unconditional.batches([{}] * 6)
    assert [batch.fields for batch in batches] == [{"count": 4}, {"count": 2}]


def test_an_image_does_not_depend_on_the_others_of_its_call(text: CalibrationModel) -> None:
    together, (alone,) = text.batches([CIRCLE, SQUARE]), text.batches([SQUARE])
    with text.pipeline() as pipeline:
        *_, both = pipeline.steps(together[0].request(7, num_inference_steps=3))
        *_, one = pipeline.steps(alone.request(8, num_inference_steps=3))
    assert both.latents[1] == pytest.approx(one.latents[0], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": ()}, "requests: got none to calibrate with"),
        ({"trial_requests": ()}, "trial requests: got none to calibrate with"),
        ({"requests": ({"seed": 1},)}, "requests\\[0\\]: got field 'seed', expected only"),
        ({"requests": ("text",)}, "requests\\[0\\]: got str"),
        ({"steps": 1}, "steps: got 1, expected a whole number from 2 to 1000"),
        ({"sensitivity": "x"}, "sensitivity: got 'x'"),
        ({"min_psnr": float("nan")}, "min psnr: got nan"),
        ({"max_accuracy_loss": 2.0}, "max accuracy loss: got 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"^{message}"):
        CalibrationSettings(**{"requests": (CIRCLE,), "trial_requests": (CIRCLE,), **change})


def test_a_bound_on_accuracy_needs_a_grader() -> None:
    settings = CalibrationSettings((CIRCLE,), (CIRCLE,), max_accuracy_loss=0.1)
    with pytest.raises(SpecError, match=r"^max accuracy loss: got 0\.1, but no grader"):
        check_grade(settings, None)
    check_grade(settings, lambda images, requests: None)


def test_the_budget_is_not_among_the_observed_settings() -> None:
    one = CalibrationSettings((CIRCLE,), (CIRCLE,), min_psnr=30.0)
    other = CalibrationSettings((CIRCLE,), (SQUARE, CIRCLE), min_psnr=20.0, trial_steps=9)
    assert one.observed == other.observed and json.loads(json.dumps(one.observed)) == one.observed | {
        "requests": [CIRCLE]
    }
