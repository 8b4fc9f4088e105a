"""Requests, options and limits that the batch scheduler refuses."""

from __future__ import annotations

import pytest

from ldm_runtime import Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.errors import SpecError


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "prompts: got an empty list"),
        (Request("a", num_inference_steps=0), "steps: got 0"),
        (Request("a", eta=float("nan")), "eta: got nan"),
        (Request("a", guidance_scale=float("inf")), "guidance_scale"),
        (Request("a", height=65), "height: got 65, expected a multiple of 2"),
        (Request("a", seed=2**64), "seed: got"),
        (Request("a", images_per_prompt=32, guidance_scale=2.0), "need 64 rows of a UNet call"),
        (Request("a", count=2), "count: got a number"),
        (Request("a", guidance_every=0), "guidance_every: got 0"),
        (Request("a", guidance_interval=(1, 0)), "guidance_interval: got 1 to 0"),
        (Request("\ud800"), "lone surrogate"),
        (Request("a" * 50_001), "50001 characters"),
    ],
)
def test_bad_requests_do_not_affect_others(scheduler, request_: Request, message: str) -> None:
    beside = scheduler.submit(Request("a", seed=0, num_inference_steps=5))
    with pytest.raises(SpecError, match=message):
        scheduler.submit(request_).result(20)
    beside.result(20)
    assert scheduler.ready


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 5}, "priority: got 5"),
        ({"timeout": 0}, "timeout: got 0"),
        ({"preview_every": -1}, "preview_every"),
    ],
)
def test_bad_options_are_refused(scheduler, options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        scheduler.submit(Request("a"), **options)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_rows": 0},
        {"max_queue": 0},
        {"max_sizes": 2.0},
        {"row_buckets": (4, 2), "max_rows": 2},
        {"row_buckets": (4,), "max_rows": 8},
    ],
)
def test_bad_limits_are_refused(limits: dict) -> None:
    with pytest.raises(SpecError, match="limits: "):
        Limits(**limits)
