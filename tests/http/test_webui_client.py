"""A client of AUTOMATIC1111's API generates images on our server, which refuses what it cannot do."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import webuiapi
from PIL import Image

from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.http.server_options import ServerOptions
from tests.http.conftest import Served, running
from tests.support.documentation import blocks
from tests.support.waiting import wait_until

KEY = "a key of the tests"
FAST = {"steps": 3, "seed": 5, "width": 16, "height": 16, "cfg_scale": 4.0, "eta": 0.5}


def client_of(server: Served, **options: Any) -> webuiapi.WebUIApi:
    address = urlsplit(server.url)
    return webuiapi.WebUIApi(host=address.hostname, port=address.port, sampler="Automatic", **options)


@pytest.fixture
def client(served: Served) -> webuiapi.WebUIApi:
    return client_of(served)


def post(server: Served, path: str, body: Any) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/sdapi/v1/{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


def test_the_images_are_the_pipelines(client: webuiapi.WebUIApi, models: dict[str, ServedModel]) -> None:
    answer = client.txt2img(prompt="a red circle", negative_prompt="blue square", batch_size=2, n_iter=2, **FAST)
    expected = models["text"].pipeline(
        ["a red circle"],
        negative_prompt="blue square",
        images_per_prompt=4,
        seed=[5, 6, 7, 8],
        num_inference_steps=3,
        guidance_scale=4.0,
        eta=0.5,
        width=16,
        height=16,
    )
    assert len(answer.images) == 4
    for got, image in zip(answer.images, expected.images, strict=True):
        assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() <= 1
    assert answer.info["all_seeds"] == [5, 6, 7, 8] and answer.info["seed"] == 5
    assert (answer.info["width"], answer.info["height"], answer.info["steps"]) == (16, 16, 3)
    assert answer.info["all_prompts"] == ["a red circle"] * 4
    assert "Negative prompt: blue square" in answer.info["infotexts"][0] and "Seed: 8" in answer.info["infotexts"][3]
    assert answer.parameters["cfg_scale"] == 4.0
    alone = client.txt2img(prompt="a red circle", negative_prompt="blue square", **{**FAST, "seed": 7})
    assert np.abs(np.asarray(alone.image).astype(int) - np.asarray(expected.images[2])).max() <= 1


def test_a_new_seed_is_drawn_and_told(client: webuiapi.WebUIApi) -> None:
    first = client.txt2img(prompt="a circle", **{**FAST, "seed": -1})
    again = client.txt2img(prompt="a circle", **{**FAST, "seed": first.info["seed"]})
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    other = client.txt2img(prompt="a circle", **{**FAST, "seed": -1})
    assert other.info["seed"] != first.info["seed"]


def test_fields_that_are_left_out_take_the_models_defaults(served: Served) -> None:
    answer = post(served, "txt2img", {"prompt": "a circle"})
    info = json.loads(answer["info"])
    assert (info["steps"], info["cfg_scale"], info["width"], info["sampler_name"]) == (10, 3.0, 16, "Automatic")
    assert post(served, "txt2img", {"prompt": "a circle", "send_images": False, "steps": 1})["images"] == []


def test_samplers_are_those_of_the_model(client: webuiapi.WebUIApi) -> None:
    names = client.util_get_sampler_names()
    assert {"Automatic", "DDIM", "DPM++ 2M", "UniPC"} <= set(names) and "Euler a" not in names
    images = {
        name: np.asarray(client.txt2img(prompt="a circle", sampler_name=name, **{**FAST, "steps": 4}).image)
        for name in names
    }
    assert np.array_equal(images["Automatic"], images["DDIM"])
    assert not np.array_equal(images["DDIM"], images["UniPC"])
    with pytest.raises(RuntimeError, match="sampler_name: got EulerAncestralDiscreteScheduler, but"):
        client.txt2img(prompt="a circle", sampler_name="Euler a", **FAST)
    assert client.util_get_scheduler_names() == ["automatic"]


def test_models_are_listed_and_selected(models: dict[str, ServedModel]) -> None:
    with running(models) as server:
        client = client_of(server)
        assert client.util_get_model_names() == ["plain", "text"]
        assert client.util_get_current_model() == "text"
        client.util_set_model("plain")
        assert client.util_get_current_model() == "plain"
        assert client.txt2img(prompt="", **{**FAST, "cfg_scale": 1.0}).info["sd_model_name"] == "plain"
        other = {"override_settings": {"sd_model_checkpoint": "text [abc]"}}
        assert client.txt2img(prompt="a circle", **FAST, **other).info["sd_model_name"] == "text"
        assert client.util_get_current_model() == "plain"
        assert post(server, "options", {"CLIP_stop_at_last_layers": 2, "sd_model_checkpoint": "text"}) is None
        with pytest.raises(urllib.error.HTTPError, match="400"):
            post(server, "options", {"sd_model_checkpoint": "none"})


def test_progress_while_an_image_is_generated(client: webuiapi.WebUIApi, served: Served) -> None:
    idle = client.get_progress()
    assert idle["progress"] == 0.0 and idle["state"]["job_count"] == 0
    work = threading.Thread(target=client_of(served).txt2img, kwargs={"prompt": "a", **FAST, "steps": 300})
    work.start()
    seen = []
    assert wait_until(lambda: seen.append(client.get_progress()) or 0 < seen[-1]["progress"] < 1)  # type: ignore[func-returns-value]
    state = seen[-1]["state"]
    assert state["sampling_steps"] == 300 and 0 < state["sampling_step"] < 300 and seen[-1]["eta_relative"] > 0
    work.join(60)
    assert client.get_progress()["state"]["job_count"] == 0


STRANGE: dict[str, Any] = {
    "unknown": {"alpha": float("nan"), "beta": "\ud800", "gamma": [[]]},
    "settings": {"override_settings": {"a": float("inf"), "b": "\ud800"}},
    "no images": {"send_images": 0},
    "scripts": {"alwayson_scripts": {"a": {}, "b": {"args": [False]}, "c": None}},
}


@pytest.mark.parametrize("case", STRANGE)
def test_fields_without_a_meaning_are_ignored(served: Served, case: str) -> None:
    answer = post(served, "txt2img", {"prompt": "a circle", **FAST, **STRANGE[case]})
    assert answer["parameters"] == {"prompt": "a circle", **FAST}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 0}, "steps: got 0, expected"),
    "cfg_scale": ({"cfg_scale": "much"}, "cfg_scale: got 'much'"),
    "width": ({"width": 17}, "width: got 17, expected a multiple of 2"),
    "images": ({"batch_size": 4, "n_iter": 3}, "batch_size times n_iter: got 12, expected a whole number from 1 to 10"),
    "batch": ({"batch_size": 0}, "batch_size: got 0, expected a whole number from 1"),
    "seed": ({"seed": 1.5}, "seed: got 1.5, expected a whole number, or -1"),
    "sampler": ({"sampler_name": "DPM2"}, "sampler_name: got 'DPM2', expected one of Automatic, DDIM"),
    "scheduler": ({"scheduler": "Karras"}, "scheduler: got 'Karras', expected Automatic"),
    "high resolution": ({"enable_hr": True}, "enable_hr: got True, but this is not supported"),
    "styles": ({"styles": ["film"]}, "styles: got ['film'], but this is not supported"),
    "scripts": ({"alwayson_scripts": {"ControlNet": {"args": [{}]}}}, "alwayson_scripts: got scripts"),
    "model": (
        {"override_settings": {"sd_model_checkpoint": "sdxl"}},
        "sd_model_checkpoint: got 'sdxl', expected one of",
    ),
    "settings": ({"override_settings": ["text"]}, "sd_model_checkpoint: got ['text'], expected"),
    "surrogate": ({"prompt": "\ud800"}, "prompt"),
    "large seed": ({"seed": 10**30}, "seed: got 1"),
    "not a number": ({"eta": float("nan")}, "eta: got nan"),
    "wide": ({"width": "x" * 100_000}, "size: got 'x"),
    "prompt": ({"prompt": ["a", "b"]}, "prompt: got ['a', 'b'], expected a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_generated(served: Served, case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(served, "txt2img", {"prompt": "a circle", **fields})
    body = json.loads(raised.value.read())
    assert raised.value.code == 400 and body["detail"].startswith(message), body
    assert body["error"] == "invalid_value" and body["errors"] == body["detail"]


def test_a_key_is_the_password_of_basic_authentication(models: dict[str, ServedModel]) -> None:
    with running(models, ServerOptions(api_key=KEY)) as server:
        client = client_of(server, username="anyone", password=KEY)
        assert client.txt2img(prompt="a circle", **FAST).images
        with pytest.raises(RuntimeError, match="401"):
            client_of(server, username=KEY, password="wrong").txt2img(prompt="a circle", **FAST)
        with pytest.raises(RuntimeError, match="401"):
            client_of(server).txt2img(prompt="a circle", **FAST)
        for broken in ("Basic", "Basic !", "Basic YQ==", f"basic {KEY}"):
            request = urllib.request.Request(f"{server.url}/sdapi/v1/options", headers={"Authorization": broken})
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request)


@pytest.mark.parametrize("page", ["docs/guides/http.md", "docs/guides/http-clients.md"])
def test_the_programs_of_the_documentation_run(
    served: Served, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks(page) if block.language == "python")
    port = str(urlsplit(served.url).port)
    program = block.text.replace("8000", port).replace("width=64, height=64", "width=16, height=16")
    exec(compile(program, page, "exec"), {})
    with Image.open("image.png") as image:
        assert image.size == (16, 16)
