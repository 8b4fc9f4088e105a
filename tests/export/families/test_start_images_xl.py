"""Image to image and inpainting with Stable Diffusion XL: images equal those of diffusers' pipelines."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from diffusers import StableDiffusionXLInpaintPipeline
from numpy.typing import NDArray
from PIL import Image

from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.families import family_named, open_checkpoint
from ldm_export.quality.measures import TOLERANCES
from ldm_export.quality.verification import verify
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from ldm_runtime.errors import SpecError
from ldm_runtime.http.served_model import ServedModel
from tests.http.conftest import ENGINE, running
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion_xl import stable_diffusion_xl_checkpoint
from tests.support.start_images import IMAGE, MASK, assert_same, drawing, ours, theirs
from tests.support.torch_pipeline import torch_pipelines

PROMPTS, NEGATIVE = ["a red circle!", "the photo, green"], ["", "a square"]
GUIDANCE = 5.0  # StableDiffusionXLInpaintPipeline has another default than the two others


@pytest.fixture(scope="module")
def checkpoints(xl_checkpoint: Path, shared: SharedFolders) -> dict[int, Path]:
    """Channels of the UNet -> checkpoint; read-only."""
    inpainting = shared.once("sdxl9", lambda folder: stable_diffusion_xl_checkpoint(folder, inpainting=True))
    return {4: xl_checkpoint, 9: inpainting}


@pytest.fixture(scope="module")
def pipelines(
    checkpoints: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, LatentDiffusionPipeline]:
    """Channels of the UNet -> our pipeline of the checkpoint's modules."""
    return torch_pipelines(checkpoints, tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def references(checkpoints: dict[int, Path]) -> dict[int, Any]:
    """Channels of the UNet -> diffusers' inpainting pipeline."""
    return {
        channels: StableDiffusionXLInpaintPipeline.from_pretrained(folder, add_watermarker=False)
        for channels, folder in checkpoints.items()
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"prompt": PROMPTS[:1], "image": IMAGE, "num_inference_steps": 7},
    "two images each, other texts": {
        "prompt": PROMPTS,
        "prompt_2": ["green", "the"],
        "negative_prompt": NEGATIVE,
        "image": IMAGE,
        "num_images_per_prompt": 2,
        "strength": 0.4,
    },
    "sizes, a layer skipped": {
        "prompt": PROMPTS[:1],
        "image": IMAGE,
        "strength": 1.0,
        "clip_skip": 1,
        "original_size": (40, 24),
        "crops_coords_top_left": (3, 9),
        "negative_target_size": (4, 5),
        "guidance_rescale": 0.7,
    },
    "a stream for each image": {"prompt": PROMPTS, "image": [IMAGE, IMAGE], "strength": 0.7, "seed": [7, 8]},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("kind", ["image", "mask, 4 channels", "mask, 9 channels"])
def test_options(
    pipelines: dict[int, LatentDiffusionPipeline], references: dict[int, Any], case: str, kind: str
) -> None:
    options, channels = {"num_inference_steps": 4, **OPTIONS[case]}, 9 if "9" in kind else 4
    seed = options.pop("seed", 3)
    if "mask" in kind:
        options["mask_image"] = [MASK, MASK.transpose(0)] if isinstance(options["image"], list) else MASK
    expected = theirs(references[channels], seed, guidance_scale=GUIDANCE, **options)
    assert_same(ours(pipelines[channels], seed, **options), expected)


@pytest.mark.parametrize("channels", [4, 9])
def test_a_crop_around_the_mask(
    pipelines: dict[int, LatentDiffusionPipeline], references: dict[int, Any], channels: int
) -> None:
    options: dict[str, Any] = {"image": drawing(61, 44), "mask_image": drawing(61, 44, "L"), "padding_mask_crop": 5}
    options |= {"prompt": PROMPTS[:1], "strength": 0.7, "num_inference_steps": 4, "width": 24, "height": 16}
    expected = theirs(references[channels], 1, guidance_scale=GUIDANCE, **options)
    assert expected.shape == (1, 44, 61, 3)
    assert_same(ours(pipelines[channels], 1, **options), expected)


def test_requests_that_do_not_fit(pipelines: dict[int, LatentDiffusionPipeline]) -> None:
    for channels, fields, message in (
        (4, {"strength": 0.5}, "strength: got a value without an image"),
        (4, {"image": IMAGE, "num_inference_steps": 3}, "strength: got 0.3 with 3 steps, .* expected at least 0.3334"),
        (4, {"image": IMAGE, "negative_crops_coords_top_left": (1, 2)}, "top_left: got a value beside an image"),
        (9, {"image": IMAGE}, "mask: got none, expected an image and a mask"),
    ):
        with pytest.raises(SpecError, match=message):
            pipelines[channels].plan(Request("a", **fields))  # type: ignore[arg-type]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def from_base64(image: str) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image))), np.int64)[None]


def by_web_ui(url: str, body: dict[str, Any]) -> NDArray[np.int64]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return from_base64(json.load(response)["images"][0])


def test_the_apis_and_the_command_line(xl_bundle: Bundle, references: dict[int, Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompt": ["a photo"], "strength": 0.6, "num_inference_steps": 4}
    options |= {"image": IMAGE, "mask_image": MASK, "height": 16, "width": 24}
    expected = theirs(references[4], 3, guidance_scale=GUIDANCE, **options)
    IMAGE.save(tmp_path / "a.png")
    MASK.save(tmp_path / "m.png")
    command = ["generate", str(xl_bundle.folder), "a photo", "--image", str(tmp_path / "a.png"), "--strength", "0.6"]
    command += ["--steps", "4", "--seed", "3", "--precision", "fp32", "--backend", "onnxruntime"]
    command += ["--mask", str(tmp_path / "m.png"), "--height", "16", "--width", "24", "-o", str(tmp_path / "out.png")]
    assert main(command) == 0
    assert_same(np.asarray(Image.open(tmp_path / "out.png"), np.int64)[None], expected)
    model = ServedModel.open(xl_bundle.folder, "xl", ENGINE)
    try:
        with running({"xl": model}) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            common = {"prompt": "a photo", "steps": 4, "seed": 3, "width": 24, "height": 16}
            photo, mask = (base64.b64encode(png(image)).decode() for image in (IMAGE, MASK))
            webui = {**common, "init_images": [photo], "denoising_strength": 0.6, "cfg_scale": GUIDANCE}
            webui |= {"mask": mask, "mask_blur": 0, "inpaint_full_res": False, "sampler_name": "Euler"}
            assert_same(by_web_ui(f"{server.url}/sdapi/v1/img2img", webui), expected)
            files = {"image": ("a.png", png(IMAGE)), "mask": ("m.png", png(MASK))}
            more = {"steps": 4, "seed": 3, "strength": 0.6}
            edit: Any = {"prompt": "a photo", "size": "24x16", "response_format": "b64_json", "extra_body": more}
            answer = client.images.edit(**files, **edit)
            assert answer.data is not None
            assert_same(from_base64(answer.data[0].b64_json or ""), expected)
    finally:
        model.close()


@pytest.mark.slow
def test_a_bundle_of_an_inpainting_model(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints[9])
    assert family_named(checkpoint.family).pipeline_of(checkpoint) == "StableDiffusionXLInpaintPipeline"
    bundle = build(checkpoint, tmp_path / "bundle", "fp16").bundle
    for precision in ("fp32", "fp16"):
        result = verify(bundle, checkpoint, [{"prompts": "a red circle"}], 4, precision, TOLERANCES[precision])
        assert result.failures == [] and "mask" in result.images[0].request
