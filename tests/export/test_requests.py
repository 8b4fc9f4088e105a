"""Labels of requests in tables, and the requests that are made without prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ldm_export.requests import REQUESTS, label
from ldm_runtime.errors import SpecError


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


@pytest.mark.parametrize("kinds", [kinds for kinds in REQUESTS if "text" not in kinds], ids=str)
def test_models_without_text_refuse_prompts(kinds: tuple[str, ...]) -> None:
    assert len(REQUESTS[kinds](None)) == 4
    with pytest.raises(SpecError, match="prompts: got some, but this model"):
        REQUESTS[kinds](["a cat"])
