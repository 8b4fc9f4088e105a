"""Triton inputs of every kind of conditioning become the fields of a request."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ldm_runtime.conditioning import KINDS
from ldm_runtime.errors import SpecError
from ldm_runtime.triton.request_tensors import parse_request
from ldm_runtime.triton.tensors import KIND_FIELDS

LAYOUT = [["Person", [0.1, 0.2, 0.3, 0.4]]]


def test_every_kind_has_inputs() -> None:
    assert {kind.kind for kind in KINDS} == set(KIND_FIELDS)


def test_fields_of_a_request() -> None:
    image, mask = np.zeros((1, 8, 8, 3), np.uint8), np.ones((1, 8, 8, 1), np.uint8)
    classes, tokens = np.ones((2, 8, 8), np.int32), np.arange(92, dtype=np.int32)[None]
    request = parse_request(
        {
            "INPUT_IMAGE": image,
            "MASK": mask,
            "SEGMENTATION": classes,
            "TOKENS": tokens,
            "LAYOUT": np.array([json.dumps(LAYOUT).encode()], object),
            "LABEL": np.array([3, 4], np.int32),
        }
    ).request
    assert request.image is image and request.mask is mask and request.segmentation is classes
    assert request.tokens is tokens and request.layout == [LAYOUT] and request.labels == [3, 4]


def test_fields_of_stable_diffusion_xl() -> None:
    request = parse_request(
        {
            "PROMPT": np.array([b"a", b"b"], object),
            "PROMPT_2": np.array([b"c"], object),
            "NEGATIVE_PROMPT": np.array([b""], object),
            "NEGATIVE_PROMPT_2": np.array([b"d"], object),
            "ORIGINAL_SIZE": np.array([[40, 24]], np.int32),
            "NEGATIVE_CROPS_COORDS_TOP_LEFT": np.array([1, 2], np.int32),
        }
    ).request
    assert (request.prompts, request.prompts_2) == (["a", "b"], ["c"])
    assert (request.negative_prompt, request.negative_prompt_2) == ([""], ["d"])
    assert (request.original_size, request.target_size) == ((40, 24), None)
    assert request.negative_crops_coords_top_left == (1, 2)
    assert parse_request({}).request.negative_prompt is None
    with pytest.raises(SpecError, match=r"^TARGET_SIZE: got 3 values, expected 2"):
        parse_request({"TARGET_SIZE": np.array([1, 2, 3], np.int32)})


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b"NaN,"])
def test_layouts_that_are_no_json(text: bytes) -> None:
    with pytest.raises(SpecError, match=r"^LAYOUT 0: is not JSON; send"):
        parse_request({"LAYOUT": np.array([text], object)})
