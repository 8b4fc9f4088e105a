"""OpenAI's Python client generates, edits and streams images of our server."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.http.server_options import ServerOptions
from tests.http.conftest import ENGINE, Served, running
from tests.support.paper_bundles import paper_bundle
from tests.support.shared import SharedFolders

KEY = "a key of the tests"
FAST = {"steps": 3, "seed": 5}


def picture(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def client_of(server: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served) as opened:
        yield opened


def pixels(model: ServedModel, *arguments: Any, **options: Any) -> list[np.ndarray]:
    return [np.asarray(image) for image in model.pipeline(*arguments, **options).images]


def test_the_image_is_the_pipelines(client: openai.OpenAI, models: dict[str, ServedModel]) -> None:
    extra = {**FAST, "guidance": 4.0, "eta": 0.5, "negative_prompt": "blue square"}
    answer = client.images.generate(model="text", prompt="a red circle", n=2, size="32x16", extra_body=extra)
    assert answer.size == "32x16" and answer.output_format == "png" and answer.data is not None
    expected = pixels(
        models["text"],
        ["a red circle"],
        negative_prompt="blue square",
        images_per_prompt=2,
        num_inference_steps=3,
        seed=5,
        guidance_scale=4.0,
        eta=0.5,
        width=32,
        height=16,
    )
    assert len(answer.data) == 2
    for entry, image in zip(answer.data, expected, strict=True):
        assert entry.b64_json is not None and entry.model_dump()["seed"] == 5
        assert np.abs(picture(entry.b64_json).astype(int) - image).max() <= 1
    assert not np.array_equal(expected[0], expected[1])


def test_server_timing(client: openai.OpenAI) -> None:
    """An answer says how long each stage took; a stream, which has only begun, when the request was admitted."""

    def stages(header: str) -> dict[str, float]:
        return {name: float(value) for name, value in (part.split(";dur=") for part in header.split(", "))}

    begun = time.monotonic()
    whole = client.images.with_raw_response.generate(model="text", prompt="a circle", extra_body=FAST)
    milliseconds = 1000 * (time.monotonic() - begun)
    found = stages(whole.headers["server-timing"])
    assert list(found) == ["admission", "queue", "encode", "steps", "decode"]
    assert found["steps"] > 0 and min(found.values()) >= 0 and sum(found.values()) <= milliseconds + 1
    with client.images.with_streaming_response.generate(
        model="text", prompt="a circle", stream=True, extra_body=FAST
    ) as stream:
        assert list(stages(stream.headers["server-timing"])) == ["admission"]
        stream.read()
    for sent, seconds in (("t=1000000000.5", time.time() - 1e9), ("t=1e9", None), ("now", None)):
        timed = client.images.with_raw_response.generate(
            model="text", prompt="a circle", extra_body=FAST, extra_headers={"X-Request-Start": sent}
        )
        waited = stages(timed.headers["server-timing"]).get("wait")
        assert waited == (None if seconds is None else pytest.approx(1000 * seconds, abs=1e6)), sent


def test_a_model_without_conditioning_and_the_seed_of_the_answer(client: openai.OpenAI) -> None:
    first = client.images.generate(model="plain", prompt="", extra_body={"steps": 2})
    assert first.data is not None and first.data[0].b64_json is not None
    again = client.images.generate(
        model="plain", prompt="", extra_body={"steps": 2, "seed": first.data[0].model_dump()["seed"]}
    )
    assert again.data is not None and again.data[0].b64_json == first.data[0].b64_json


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_formats_and_urls(client: openai.OpenAI, name: Any) -> None:
    answer = client.images.generate(
        model="text", prompt="a circle", response_format="url", output_format=name, extra_body=FAST
    )
    assert answer.data is not None and answer.data[0].url is not None
    with urllib.request.urlopen(answer.data[0].url) as response:
        assert response.headers["Content-Type"] == f"image/{name}"
        assert Image.open(io.BytesIO(response.read())).format == name.upper()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(answer.data[0].url[:-8] + "x.png")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["text", "plain"]
    facts = client.models.retrieve("text").model_dump()["ldm"]
    assert facts["conditioning"] == ["text"] and facts["guidance"] is True
    assert facts["defaults"] == {"num_inference_steps": 10, "eta": 0.3, "guidance_scale": 3.0, "full_share": 0.1}
    with pytest.raises(openai.NotFoundError, match="expected one of text, plain"):
        client.models.retrieve("dall-e-3")


def test_a_stream_of_partial_images(client: openai.OpenAI) -> None:
    whole = client.images.generate(model="text", prompt="a circle", extra_body={**FAST, "steps": 12})
    stream = client.images.generate(
        model="text", prompt="a circle", stream=True, partial_images=2, extra_body={**FAST, "steps": 12}
    )
    events = list(stream)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    (final,) = [event for event in events if event.type == "image_generation.completed"]
    assert [event.partial_image_index for event in partial] == [0, 1] and events[-1] is final
    assert whole.data is not None and final.b64_json == whole.data[0].b64_json
    assert len({event.b64_json for event in (*partial, final)}) == 3
    assert final.size == "16x16" and final.usage.total_tokens == 0


def test_an_edit_repaints_what_the_mask_shows(shared: SharedFolders) -> None:
    paper = paper_bundle(shared, "inpainting_big")
    model = ServedModel.open(paper.bundle.folder, "inpainting", ENGINE)
    height, width = (model.facts()["ldm"][side][1] for side in ("height", "width"))
    rng = np.random.default_rng(0)
    given = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    inside = np.zeros((height, width), bool)
    inside[: height // 2, : width // 2] = True
    white = Image.fromarray(np.where(inside, 255, 0).astype(np.uint8))
    transparent = Image.fromarray(np.dstack([given, np.where(inside, 0, 255).astype(np.uint8)]))
    try:
        with running({"inpainting": model}) as server, client_of(server) as client:
            results = []
            for mask in (white, transparent):
                files = [(name, png(image)) for name, image in (("a.png", Image.fromarray(given)), ("m.png", mask))]
                answer = client.images.edit(
                    image=files[0], mask=files[1], prompt="", n=2, extra_body={"steps": 2, "seed": 3}
                )
                assert answer.data is not None and len(answer.data) == 2
                results.append([picture(entry.b64_json or "") for entry in answer.data])
            assert np.array_equal(results[0], results[1]), "both kinds of masks mean the same"
            for image in results[0]:
                assert np.array_equal(image[~inside], given[~inside])
                assert np.abs(image[inside].astype(int) - given[inside]).mean() > 10
            with pytest.raises(openai.BadRequestError, match="image: cannot be read as an image"):
                client.images.edit(image=("a.png", b"no image"), mask=("m.png", png(white)), prompt="")
            with pytest.raises(openai.BadRequestError, match="mask: got none, expected an image and a mask"):
                client.images.edit(image=("a.png", png(white)), prompt="")
    finally:
        model.close()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_key_is_required_where_there_is_one(models: dict[str, ServedModel]) -> None:
    with running(models, ServerOptions(api_key=KEY)) as server:
        with client_of(server, KEY) as client:
            assert len(list(client.models.list())) == 2
        for wrong in ("none", "", KEY[:-1]):
            with client_of(server, wrong or "x") as client, pytest.raises(openai.AuthenticationError, match="Bearer"):
                client.images.generate(prompt="a circle")
        for path in ("/healthz", "/readyz", "/"):
            assert urllib.request.urlopen(server.url + path).status == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(server.url + "/metrics")


REFUSED: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "steps": ({"extra_body": {"steps": 0}}, "steps", "steps: got 0, expected"),
    "guidance": ({"extra_body": {"guidance": "much"}}, "guidance", "guidance: got 'much'"),
    "size": ({"size": "17x16"}, "width", "width: got 17, expected a multiple of 2"),
    "no size": ({"size": "large"}, "size", "size: got 'large', expected auto or WIDTHxHEIGHT"),
    "n": ({"n": 11}, "n", "n: got 11, expected a whole number from 1 to 10"),
    "format": ({"output_format": "gif"}, "output_format", "expected one of png, jpeg, webp"),
    "unknown": ({"extra_body": {"sampler": "euler"}}, "sampler", "sampler: is unknown"),
    "prompt": ({"prompt": "x" * 4001}, "prompt", "prompt: got 4001 characters, expected at most 4000"),
    "labels": ({"extra_body": {"labels": [3]}}, "labels", "labels: got a value, but this text_to_image model takes"),
    "transparent": ({"background": "transparent"}, "background", "draw no transparency"),
    "image": ({"extra_body": {"image": "aGVsbG8="}}, "image", "send images to /v1/images/edits"),
    "url": ({"stream": True, "response_format": "url"}, "response_format", "expected b64_json"),
    "text": ({"model": "plain"}, "prompt", "got a text, but plain draws without conditioning"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_generated(client: openai.OpenAI, case: str) -> None:
    options, param, message = REFUSED[case]
    with pytest.raises(openai.BadRequestError) as raised:
        client.images.generate(**{"model": "text", "prompt": "a circle", **options})
    assert message in str(raised.value) and "Traceback" not in str(raised.value)
    assert raised.value.param == param and raised.value.type == "invalid_request_error"


def test_errors_of_a_stream_are_events(client: openai.OpenAI, served: Served) -> None:
    body = {"model": "text", "prompt": "a circle", "stream": True, "progress": True, **FAST}
    request = urllib.request.Request(
        f"{served.url}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in response.read().decode().splitlines() if line.startswith("data: ")]
    steps = [event["step"] for event in events if event["type"] == "progress"]
    assert steps == [0, 1, 2, 3] and events[-1]["type"] == "image_generation.completed"
