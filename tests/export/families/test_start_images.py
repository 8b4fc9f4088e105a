"""Image to image and inpainting: images of small checkpoints equal those of diffusers' pipelines for these tasks."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from diffusers import StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.families import open_checkpoint
from ldm_export.quality.verification import verify
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.conditioning import pictures
from ldm_runtime.conditioning.pictures import crop_box, pasted, resized
from ldm_runtime.errors import SpecError
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.images import pil_image
from tests.http.conftest import ENGINE, running
from tests.support import start_images
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion import SCHEDULERS, stable_diffusion_checkpoint
from tests.support.start_images import IMAGE, MASK, assert_same, drawing
from tests.support.torch_pipeline import torch_pipelines

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers' DPM-Solver
    pytest.mark.filterwarnings("ignore:You have passed .* text prompts:FutureWarning"),
]
PROMPTS = ["a red circle!", "the photo, green"]
STEPS = 5


@pytest.fixture(scope="module")
def checkpoints(shared: SharedFolders) -> dict[int, Path]:
    """Channels of the UNet -> checkpoint; read-only."""
    return {
        4: shared.once("sd1", lambda folder: stable_diffusion_checkpoint(folder, 1)),
        9: shared.once("sd9", lambda folder: stable_diffusion_checkpoint(folder, 1, inpainting=True)),
    }


@pytest.fixture(scope="module")
def pipelines(
    checkpoints: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, LatentDiffusionPipeline]:
    """Channels of the UNet -> our pipeline of the checkpoint's modules."""
    return torch_pipelines(checkpoints, tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(scope="module")
def references(checkpoints: dict[int, Path]) -> dict[int, Any]:
    """Channels of the UNet -> diffusers' inpainting pipeline."""
    found = {}
    for channels, folder in checkpoints.items():
        found[channels] = StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
        found[channels].set_progress_bar_config(disable=True)
    return found


theirs = partial(start_images.theirs, num_inference_steps=STEPS)
ours = partial(start_images.ours, num_inference_steps=STEPS)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "UniPCMultistepScheduler"])
def test_schedulers(pipelines: dict[int, LatentDiffusionPipeline], references: dict[int, Any], name: str) -> None:
    scheduler = SCHEDULERS[name]
    with pytest.MonkeyPatch.context() as patch:
        from ldm_runtime import planner
        from ldm_runtime.schedulers import scheduler_from_config

        config = {"class": type(scheduler).__name__, **scheduler.config}
        patch.setattr(planner, "replacement", lambda asked, model: scheduler_from_config(config))
        for seed, (mask, strength) in enumerate([(None, 0.5), (MASK, 0.7), (MASK, 1.0)]):
            options = {"prompt": PROMPTS, "image": IMAGE, "mask_image": mask, "strength": strength, "eta": 0.5}
            options = {name: value for name, value in options.items() if value is not None}
            expected = theirs(references[4], seed, scheduler, **options)
            assert_same(ours(pipelines[4], seed, scheduler=type(scheduler).__name__, **options), expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {"prompt": PROMPTS[:1], "image": IMAGE},
    "two images each": {"prompt": PROMPTS, "image": IMAGE, "num_images_per_prompt": 2, "strength": 0.4},
    "an image for each prompt": {"prompt": PROMPTS, "image": [IMAGE, drawing(24, 17).transpose(0)], "strength": 1.0},
    "without guidance": {"prompt": PROMPTS[:1], "image": IMAGE, "guidance_scale": 1.0, "eta": 1.0, "strength": 0.6},
    "a stream for each image": {"prompt": PROMPTS, "image": [IMAGE, IMAGE], "strength": 0.7, "seed": [7, 8]},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("kind", ["image", "mask, 4 channels", "mask, 9 channels"])
def test_options(
    pipelines: dict[int, LatentDiffusionPipeline], references: dict[int, Any], case: str, kind: str
) -> None:
    options, channels = dict(OPTIONS[case]), 9 if "9" in kind else 4
    seed = options.pop("seed", 3)
    if "mask" in kind:
        several = isinstance(options["image"], list)
        options["mask_image"] = [MASK, MASK.transpose(0)] if several else MASK
    assert_same(ours(pipelines[channels], seed, **options), theirs(references[channels], seed, **options))


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P"])
def test_sizes_and_modes_of_masks(
    pipelines: dict[int, LatentDiffusionPipeline], references: dict[int, Any], mode: str
) -> None:
    """Images and masks are resized as by VaeImageProcessor."""
    image, mask = drawing(31, 22), drawing(31, 22, mode) if mode != "P" else drawing(31, 22, "RGB").convert("P")
    options = {"prompt": PROMPTS[0], "image": image, "mask_image": mask, "height": 24, "width": 20, "strength": 0.9}
    assert_same(ours(pipelines[4], 1, **options), theirs(references[4], 1, **options))


@pytest.mark.parametrize("channels", [4, 9])
def test_a_crop_around_the_mask(
    pipelines: dict[int, LatentDiffusionPipeline], references: dict[int, Any], channels: int
) -> None:
    image, mask = drawing(61, 44), drawing(61, 44, "L")
    options = {"prompt": PROMPTS, "image": image, "mask_image": mask, "padding_mask_crop": 5, "strength": 0.7}
    expected = theirs(references[channels], 1, **options)
    assert expected.shape == (2, 44, 61, 3)
    assert_same(ours(pipelines[channels], 1, **options), expected)


@pytest.mark.parametrize("crop", [{}, {"padding_mask_crop": 5}], ids=["whole", "cropped"])
@pytest.mark.parametrize("channels", [4, 9])
def test_a_blurred_mask(
    pipelines: dict[int, LatentDiffusionPipeline], references: dict[int, Any], channels: int, crop: dict[str, int]
) -> None:
    mask = drawing(61, 44, "L")
    options = {"prompt": PROMPTS[0], "image": drawing(61, 44), "strength": 0.7, **crop}
    expected = theirs(references[channels], 1, mask_image=VaeImageProcessor.blur(mask, 6), **options)
    assert_same(ours(pipelines[channels], 1, mask_image=mask, mask_blur=6, **options), expected)
    sharp = ours(pipelines[channels], 1, mask_image=mask, mask_blur=0, **options)
    assert np.abs(sharp - expected).max() > 4


def test_arrays_are_converted_to_images_once(
    pipelines: dict[int, LatentDiffusionPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []

    def counted(array: Any) -> Image.Image:
        converted.append(array.shape)
        return pil_image(array)

    monkeypatch.setattr(pictures, "pil_image", counted)
    image, mask = np.asarray(drawing(61, 44)), np.asarray(drawing(61, 44, "L"))[..., None]
    pipelines[4](PROMPTS[0], image=image, mask=mask, padding_mask_crop=5, num_inference_steps=2)
    assert converted == [image.shape, mask.shape]


@settings(max_examples=40)
@given(
    st.tuples(*[st.integers(16, 60)] * 2),  # diffusers fails for images that become lower than a pixel
    st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.integers(0, 20),
)
def test_crops_are_those_of_diffusers(
    size: tuple[int, int], factors: tuple[int, int], corners: tuple[float, ...], padding: int
) -> None:
    (width, height), sides = size, (8 * factors[0], 8 * factors[1])
    marked = np.zeros((height, width), np.uint8)
    (left, right), (top, bottom) = sorted(corners[:2]), sorted(corners[2:])
    marked[int(top * (height - 1)) : int(bottom * height) + 1, int(left * (width - 1)) : int(right * width) + 1] = 255
    image, mask = drawing(width, height), Image.fromarray(marked)
    processor = VaeImageProcessor(do_normalize=False)
    box = crop_box(mask, sides, padding)
    assert box == processor.get_crop_region(mask, sides[1], sides[0], pad=padding)
    filled = processor.preprocess(image, *sides, resize_mode="fill", crops_coords=box).numpy()
    np.testing.assert_array_equal(
        np.asarray(resized(image, sides, box=box)[0]), np.rint(filled[0].T * 255).swapaxes(0, 1)
    )
    parts = np.random.default_rng(0).random((1, 3, *sides), np.float32)
    (part,) = processor.numpy_to_pil(parts.transpose(0, 2, 3, 1))
    whole = np.rint(pasted(parts, image, mask, box)[0].transpose(1, 2, 0) * 255)
    np.testing.assert_array_equal(whole, np.asarray(processor.apply_overlay(mask, image, part, box)))


def test_requests_in_one_batch(sd2_bundle: Bundle) -> None:
    common = {"image": IMAGE, "num_inference_steps": 4, "height": 16, "width": 24}
    requests = [
        Request(PROMPTS, seed=1, **common, strength=0.6),
        Request(PROMPTS[0], seed=2, **common, mask=MASK, strength=0.9, eta=0.5),
        Request(PROMPTS[0], seed=3, num_inference_steps=3, height=16, width=24),
        Request(PROMPTS[1], seed=4, **common, mask=MASK, scheduler="UniPCMultistepScheduler"),
    ]
    with LatentDiffusionPipeline.from_bundle(sd2_bundle, precision="fp32", backend="onnxruntime") as pipe:
        alone = [pipe.decode([*pipe.steps(request)][-1].latents) for request in requests]
        with BatchScheduler(pipe, Limits(max_rows=16)) as scheduler:
            results = [job.result(60).images for job in [scheduler.submit(request) for request in requests]]
    for together, images in zip(results, alone, strict=True):
        assert_same(together.astype(np.int64), np.stack([np.asarray(image, np.int64) for image in images]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "strength": ({"strength": 0.5}, "strength: got a value without an image"),
    "mask": ({"mask": MASK}, "mask: got a value without an image"),
    "range": ({"image": IMAGE, "strength": 1.01}, "strength: got 1.01, expected a number from 0 to 1"),
    "no steps": ({"image": IMAGE, "strength": 0.19}, "strength: got 0.19 with 5 steps, .* at least 0.2; take"),
    "empty": ({"image": IMAGE, "mask": Image.new("L", IMAGE.size)}, "mask: got an empty one"),
    "full": ({"image": IMAGE, "mask": Image.new("L", IMAGE.size, 255)}, "mask: got a full one"),
    "size": ({"image": IMAGE, "mask": drawing(24, 24, "L")}, "mask: got 24 x 24 pixels .* the image's 17 x 24"),
    "images": ({"image": [IMAGE, IMAGE]}, "image: got 2 for 1 images to generate"),
    "large": ({"image": drawing(4000, 8)}, "image: got 8 x 4000 pixels"),
    "text": ({"image": "a.png"}, "image: got 'a.png', expected PIL images"),
    "crop": ({"image": IMAGE, "padding_mask_crop": 3}, "padding_mask_crop: got a value without a mask"),
    "padding": ({"image": IMAGE, "mask": MASK, "padding_mask_crop": -1}, "padding_mask_crop: got -1, expected"),
    "blur": ({"image": IMAGE, "mask_blur": 3}, "mask_blur: got a value without a mask"),
    "wide blur": ({"image": IMAGE, "mask": MASK, "mask_blur": 65}, "mask_blur: got 65, expected a number from 0 to 64"),
    "blur of numbers": (
        {
            "image": np.zeros((1, 3, 16, 16), np.float32),
            "mask": np.eye(16, dtype=np.float32)[None, None],
            "mask_blur": 3,
        },
        "mask_blur: expected masks as PIL images or uint8 arrays; blur",
    ),
    "empty, cropped": (
        {"image": IMAGE, "mask": Image.new("L", IMAGE.size), "padding_mask_crop": 3},
        "mask: got an emp",
    ),
    "latents": ({"image": IMAGE, "latents": np.zeros((1, 4, 4, 4), np.float32)}, "latents: got a value beside"),
    "numbers": ({"image": np.full((1, 3, 16, 16), 2, np.float32)}, "image: got values from 2 to 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_do_not_fit(pipelines: dict[int, LatentDiffusionPipeline], case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(SpecError, match=message):
        pipelines[4].plan(Request("a", num_inference_steps=STEPS, **fields))


def test_an_inpainting_model_takes_nothing_else(pipelines: dict[int, LatentDiffusionPipeline]) -> None:
    for fields, message in (({}, "image: got none"), ({"image": IMAGE}, "mask: got none")):
        with pytest.raises(SpecError, match=message):
            pipelines[9].plan(Request("a", **fields))


def test_the_images_api(sd2_bundle: Bundle) -> None:
    def png(image: Image.Image) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return "image.png", buffer.getvalue()

    model = ServedModel.open(sd2_bundle.folder, "sd", ENGINE)
    try:
        fields: dict[str, Any] = {"strength": 0.8, "mask_blur": 2.5, "padding_mask_crop": 2}
        expected = ours(model.pipeline, 3, prompt="a red circle", image=IMAGE, mask_image=MASK, **fields)
        with running({"sd": model}) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            options: dict[str, Any] = {"steps": STEPS, "seed": 3, **fields}
            answer = client.images.edit(
                image=png(IMAGE), mask=png(MASK), prompt="a red circle", response_format="url", extra_body=options
            )
            assert answer.data is not None and answer.data[0].url is not None
            received = client._client.get(answer.data[0].url).content
            assert_same(np.asarray(Image.open(io.BytesIO(received)), np.int64)[None], expected)
            with pytest.raises(openai.BadRequestError, match="strength: got a value without an image"):
                client.images.generate(prompt="a", extra_body=options)
    finally:
        model.close()


def test_the_command_line(sd2_bundle: Bundle, tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "a.png")
    MASK.save(tmp_path / "m.png")
    options = ["--image", str(tmp_path / "a.png"), "--strength", "0.6", "--steps", str(STEPS), "--seed", "1"]
    options += ["--precision", "fp32", "--backend", "onnxruntime", "-o", str(tmp_path / "out.png")]
    masked = ["--mask", str(tmp_path / "m.png"), "--mask-blur", "2.5", "--padding-mask-crop", "2"]
    with LatentDiffusionPipeline.from_bundle(sd2_bundle, precision="fp32", backend="onnxruntime") as pipe:
        for more, fields in (([], {}), (masked, {"mask": MASK, "mask_blur": 2.5, "padding_mask_crop": 2})):
            assert main(["generate", str(sd2_bundle.folder), "a photo", *options, *more]) == 0
            expected = ours(pipe, 1, prompt="a photo", image=IMAGE, strength=0.6, **fields)
            assert_same(np.asarray(Image.open(tmp_path / "out.png"), np.int64)[None], expected)


@pytest.mark.slow
def test_a_bundle_of_an_inpainting_model(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints[9])
    bundle = build(checkpoint, tmp_path / "bundle").bundle
    result = verify(bundle, checkpoint, [{"prompts": "a red circle"}], 4)
    assert result.failures == [] and "mask" in result.images[0].request
