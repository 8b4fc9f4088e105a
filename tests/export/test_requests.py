"""Labels of requests in tables, and the requests that are made without prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.requests import REQUESTS, RequestFields, label, plain_requests, requests_for
from ldm_runtime.errors import SpecError
from ldm_runtime.model import ConditioningSpec
from tests.support.small_models import text_model


@pytest.mark.parametrize(
    ("request_fields", "expected"),
    [
        ({}, "without conditioning"),
        ({"prompts": "a red circle"}, "a red circle"),
        ({"prompts": "a cat", "guidance_scale": 3}, "a cat, guidance_scale 3"),
        ({"labels": 7}, "labels 7"),
        ({"image": np.zeros((1, 3, 8, 12), np.float32)}, "image of 12 x 8 pixels"),
        ({"segmentation": np.zeros((1, 8, 12), int)}, "segmentation of 12 x 8 pixels"),
        ({"tokens": list(range(92))}, "tokens 0 1 2 3 4 5 …"),
    ],
)
def test_labels(request_fields: dict[str, Any], expected: str) -> None:
    assert label(request_fields) == expected


@pytest.mark.parametrize("requests", [plain_requests, *(one for kind, one in REQUESTS.items() if kind != "text")])
def test_models_without_text_refuse_prompts(requests: Callable[..., tuple[RequestFields, ...]]) -> None:
    assert len(requests(None)) == 4
    with pytest.raises(SpecError, match="prompts: got some, but this model"):
        requests(["a cat"])


def test_further_kinds_of_conditioning_change_no_request(tmp_path: Path) -> None:
    model = text_model(tmp_path / "model").model
    further = tuple(ConditioningSpec(kind, "", {}, ()) for kind in ("start_image", "safety_checker"))
    checked = replace(model, conditioning=(*model.conditioning, *further))
    assert requests_for(checked, ["a cat"]) == ({"prompts": "a cat"},)
    with pytest.raises(SpecError, match="on start_image, which has no defaults, expected one of text, label"):
        requests_for(replace(model, conditioning=further), None)
