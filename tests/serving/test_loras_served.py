"""LoRA adapters that requests to a Triton server select: the images of the same requests in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tritonclient.utils import InferenceServerException

from ldm_export.cli import main
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from tests.support.triton_client import over_http
from tests.support.triton_server import TritonServer

PROMPT = "a large red circle in the center on a white background"
WISH = {"PROMPT": PROMPT, "SEED": 5, "STEPS": 4}


def test_images_are_those_of_the_same_selection_here(
    triton_server: TritonServer, served_bundle: Bundle, local_images: Callable[[Request], np.ndarray], tmp_path: Path
) -> None:
    options = {"seed": 5, "num_inference_steps": 4}
    with LatentDiffusionPipeline.from_bundle(served_bundle, backend="onnxruntime", precision="fp32") as pipeline:
        (image,) = pipeline(PROMPT, **options, loras={"style": 0.7}).images
    expected, plain = np.asarray(image), local_images(Request(PROMPT, **options))
    answer = over_http(triton_server.http, {**WISH, "LORAS": json.dumps({"style": 0.7})})
    assert np.array_equal(answer.as_numpy("IMAGE"), expected[None])
    assert np.abs(expected.astype(int) - plain).max() > 8
    file = tmp_path / "out.png"
    arguments = [PROMPT, "--seed", "5", "--steps", "4", "--lora", "style:0.7", "-o", str(file), "--url"]
    assert main(["client", *arguments, triton_server.http]) == 0
    assert np.array_equal(np.asarray(Image.open(file)), expected)
    assert np.array_equal(over_http(triton_server.http, WISH).as_numpy("IMAGE"), plain)
    with pytest.raises(InferenceServerException, match="loras: got 'other', expected one of style; add one with"):
        over_http(triton_server.http, {**WISH, "LORAS": json.dumps({"other": 1})})
