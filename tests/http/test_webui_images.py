"""``/sdapi/v1/img2img`` through a client of AUTOMATIC1111's API: images are the pipeline's for the same request."""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from ldm_export.families import open_checkpoint
from ldm_runtime import Bundle
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.http.served_model import ServedModel
from tests.http.conftest import ENGINE, Served, running
from tests.http.test_webui_client import client_of, post
from tests.support.documentation import blocks
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion import stable_diffusion_checkpoint
from tests.support.torch_pipeline import torch_pipeline
from tests.support.waiting import wait_until

FAST = {"steps": 4, "seed": 5, "width": 16, "height": 16, "cfg_scale": 3.0, "eta": 0.0, "denoising_strength": 0.75}
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
MASK = Image.new("L", (32, 32))
ImageDraw.Draw(MASK).ellipse((6, 8, 24, 20), fill=255)
SHARP = {"mask_blur": 0, "inpaint_full_res": False}
BLURRED = MASK.filter(ImageFilter.GaussianBlur(4))


@pytest.fixture(scope="module")
def server(sd2_bundle: Bundle, shared: SharedFolders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Stable Diffusion, and an inpainting model whose UNet takes nine channels, run by torch."""
    checkpoint = shared.once("sd9", lambda folder: stable_diffusion_checkpoint(folder, 1, inpainting=True))
    pipeline = torch_pipeline(open_checkpoint(checkpoint), tmp_path_factory.mktemp("nine") / "model")
    models = {
        "sd": ServedModel.open(sd2_bundle.folder, "sd", ENGINE),
        "nine": ServedModel("nine", pipeline, BatchScheduler(pipeline, Limits(max_rows=8))),
    }
    with running(models) as served:
        yield served
    for model in models.values():
        model.close()


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "image": ("sd", {}, {}),
    "weak": ("sd", {"denoising_strength": 0.5}, {"strength": 0.5}),
    "mask": ("sd", {"mask_image": MASK, **SHARP}, {"mask": MASK}),
    "blurred": ("sd", {"mask_image": MASK, "inpaint_full_res": False}, {"mask": BLURRED}),
    "inverted": ("sd", {"mask_image": MASK, "inpainting_mask_invert": 1, **SHARP}, {"mask": ImageOps.invert(MASK)}),
    "around the mask": (
        "sd",
        {"mask_image": MASK, "inpaint_full_res_padding": 3},
        {"mask": BLURRED, "padding_mask_crop": 3},
    ),
    "nine channels": ("nine", {"mask_image": MASK, **SHARP}, {"mask": MASK}),
    "nine channels around the mask": ("nine", {"mask_image": MASK}, {"mask": BLURRED, "padding_mask_crop": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_images_are_the_pipelines(server: Served, case: str) -> None:
    name, options, fields = CASES[case]
    settings = {"override_settings": {"sd_model_checkpoint": name}, "batch_size": 2, "negative_prompt": "blue"}
    answer = client_of(server).img2img([PHOTO], prompt="a red circle", **{**FAST, **settings, **options})
    expected = server.models[name].pipeline(
        ["a red circle"],
        negative_prompt="blue",
        image=PHOTO,
        images_per_prompt=2,
        seed=[5, 6],
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        **{"strength": 0.75, **fields},
    )
    assert len(answer.images) == 2
    for got, image in zip(answer.images, expected.images, strict=True):
        assert got.size == image.size and np.asarray(image).std() > 10
        assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() <= 1
    assert answer.info["denoising_strength"] == fields.get("strength", 0.75) and answer.info["steps"] == 4
    assert "Denoising strength: " in answer.info["infotexts"][1] and "Seed: 6" in answer.info["infotexts"][1]
    assert answer.parameters["resize_mode"] == 0 and "init_images" not in answer.parameters


def test_a_transparent_mask_marks_opaque_pixels(server: Served) -> None:
    transparent = Image.merge("RGBA", (*PHOTO.split(), MASK))
    images = [
        client_of(server).img2img([PHOTO], prompt="a", mask_image=mask, **FAST).image for mask in (MASK, transparent)
    ]
    assert np.array_equal(*map(np.asarray, images))
    kept = np.asarray(BLURRED) == 0
    assert np.array_equal(np.asarray(images[0])[kept], np.asarray(PHOTO)[kept]), "the rest of the image stays"


def test_fields_that_are_left_out_take_the_models_defaults(server: Served) -> None:
    answer = post(server, "img2img", {"init_images": [encoded(PHOTO)], "steps": 2})
    info = json.loads(answer["info"])
    assert (info["denoising_strength"], info["width"], info["height"]) == (0.8, 32, 32)
    assert answer["parameters"] == {"steps": 2}


def test_progress_names_the_task(server: Served) -> None:
    client = client_of(server)
    work = threading.Thread(target=client.img2img, args=([PHOTO],), kwargs={"prompt": "a", **FAST, "steps": 400})
    work.start()
    assert wait_until(lambda: client_of(server).get_progress()["state"]["job"] == "img2img")
    assert 0 < client_of(server).get_progress()["state"]["sampling_steps"] <= 300
    work.join(60)


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


GIVEN: dict[str, Any] = {"init_images": [encoded(PHOTO)], "steps": 2, "prompt": "a"}
WITH_MASK = {**GIVEN, "mask": encoded(MASK)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no images": ({"prompt": "a"}, "init_images: got None, expected a list of 1 to 20 images in base64"),
    "no list": ({"init_images": "abc"}, "init_images: got 'abc', expected a list"),
    "no base64": (
        {"init_images": ["http://example.org/a.png"]},
        "init_images: got 'http://example.org/a.png', expected",
    ),
    "no image": ({"init_images": ["YWJj"]}, "init_images: cannot be read as an image"),
    "no text": ({"init_images": [3]}, "init_images: got 3, expected an image in base64"),
    "three images": ({**GIVEN, "init_images": [encoded(PHOTO)] * 3}, "init_images: got 3 for 1 images to generate"),
    "strength": ({**GIVEN, "denoising_strength": 2}, "denoising_strength: got 2, expected a number from 0 to 1"),
    "no strength": ({**GIVEN, "denoising_strength": 0}, "denoising_strength: got 0 with 2 steps, which leaves none"),
    "resize mode": ({**GIVEN, "resize_mode": 1}, "resize_mode: got 1, expected 0, which resizes the images"),
    "latent noise": ({**WITH_MASK, "inpainting_fill": 2}, "inpainting_fill: got 2, expected 0 or 1: the masked part"),
    "noise": ({**GIVEN, "initial_noise_multiplier": 1.1}, "initial_noise_multiplier: got 1.1, expected 1"),
    "latent mask": ({**GIVEN, "latent_mask": encoded(MASK)}, "latent_mask: got "),
    "blur": ({**GIVEN, "mask_blur": float("nan")}, "mask_blur: got nan, expected a number from 0 to 64"),
    "invert": ({**GIVEN, "inpainting_mask_invert": "no"}, "inpainting_mask_invert: got 'no', expected true or false"),
    "padding": ({**WITH_MASK, "inpaint_full_res_padding": -1}, "inpaint_full_res_padding: got -1, expected"),
    "mask": ({**WITH_MASK, "mask": encoded(MASK.resize((16, 16)))}, "mask: got 16 x 16 pixels"),
    "no mask": (
        {**GIVEN, "override_settings": {"sd_model_checkpoint": "nine"}},
        "mask: got none, expected an image and a mask",
    ),
    "scripts": ({**GIVEN, "alwayson_scripts": {"ControlNet": {"args": [{}]}}}, "alwayson_scripts: got scripts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_generated(server: Served, case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(server, "img2img", fields)
    body = json.loads(raised.value.read())
    assert raised.value.code == 400 and body["detail"].startswith(message), body


def test_images_and_tasks_that_do_not_fit(server: Served, served: Served) -> None:
    with pytest.raises(RuntimeError, match="init_images: got images; send them to /sdapi/v1/img2img"):
        client_of(server).post_and_get_api_result(f"{server.url}/sdapi/v1/txt2img", GIVEN, False)
    with pytest.raises(RuntimeError, match="init_images: got a value, but this text_to_image model takes"):
        client_of(served).img2img([PHOTO], prompt="a circle", **{**FAST, "denoising_strength": None})


def test_the_program_of_the_documentation_runs(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    PHOTO.save("photo.png")
    MASK.save("mask.png")
    program = [block.text for block in blocks("docs/guides/http-clients.md") if block.language == "python"][1]
    names: dict[str, Any] = {"api": client_of(server)}
    exec(compile(program.replace("width=512, height=512", "width=16, height=16"), "page", "exec"), names)
    with Image.open("repainted.png") as image:
        assert image.size == PHOTO.size
