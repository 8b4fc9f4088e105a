"""Requests, options and limits that the batch scheduler refuses."""

from __future__ import annotations

import pytest

from ldm_runtime import Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.errors import SpecError
from tests.support.step_gate import PROMPTS


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(""), "prompts: got an empty prompt"),
        (Request("a", num_inference_steps=0), "steps: got 0"),
        (Request("a", eta=float("nan")), "eta: got nan"),
        (Request("a", guidance_scale=float("inf")), "guidance_scale"),
        (Request("a", height=65), "height: got 65, expected a multiple of 8"),
        (Request("a", seed=2**64), "seed: got"),
        (Request("a", images_per_prompt=32, guidance_scale=2.0), "need 64 rows of a UNet call"),
        (Request("\ud800"), "lone surrogate"),
        (Request("a" * 10_001), "10001 characters"),
    ],
)
def test_bad_requests_do_not_affect_others(room, request_: Request, said: str) -> None:
    beside = room.submit(Request(PROMPTS[0], seed=0, num_inference_steps=5))
    with pytest.raises(SpecError, match=said):
        room.submit(request_).result(20)
    beside.result(20)
    assert room.ready


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"priority": 5}, "priority: got 5"),
        ({"seconds": 0}, "seconds: got 0"),
        ({"preview_every": -1}, "preview_every"),
    ],
)
def test_bad_options_are_refused(room, options: dict, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        room.submit(Request(PROMPTS[0]), **options)


@pytest.mark.parametrize(
    "limits", [{"rows": 0}, {"queue": 0}, {"call_rows": (4, 2), "rows": 2}, {"call_rows": (4,), "rows": 8}]
)
def test_bad_limits_are_refused(limits: dict) -> None:
    with pytest.raises(SpecError, match="engine room: "):
        Limits(**limits)
