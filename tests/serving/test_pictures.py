"""Images from a real Triton server: the same bytes as in this process, whole, streamed, and many at once."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from PIL import Image

from ldm_runtime import LatentDiffusionPipeline, Request
from ldm_runtime.specs import dummy_inputs
from tests.support.measured import CLOSE
from tests.support.triton_client import Grpc, over_http, post, tensor
from tests.support.triton_server import TritonServer

Draw = Callable[[Request], np.ndarray]
PROMPTS = [
    "a large red circle in the center on a white background",
    "a small blue triangle left of a large yellow cross on a gray background",
    "a small green square above a large purple square on a black background",
]
NAMES = {
    "SEED": "seed",
    "STEPS": "num_inference_steps",
    "ETA": "eta",
    "GUIDANCE": "guidance_scale",
    "GUIDANCE_EVERY": "guidance_every",
    "GUIDANCE_INTERVAL": "guidance_interval",
    "CACHE_EVERY": "cache_every",
    "FULL_STEPS": "full_steps",
    "GUIDANCE_RESCALE": "guidance_rescale",
    "SCHEDULER": "scheduler",
    "HEIGHT": "height",
    "WIDTH": "width",
    "NEGATIVE_PROMPT": "negative_prompt",
    "IMAGES_PER_PROMPT": "images_per_prompt",
}
WISHES = [
    {"PROMPT": PROMPTS[0], "SEED": 1, "STEPS": 5, "SCHEDULER": "UniPCMultistepScheduler", "GUIDANCE": 1.0},
    {"PROMPT": PROMPTS[1], "SEED": 2, "STEPS": 9},
    {"PROMPT": PROMPTS[1], "SEED": 2, "STEPS": 9, "GUIDANCE": 5.0, "GUIDANCE_EVERY": 2},
    {"PROMPT": PROMPTS[0], "SEED": 6, "STEPS": 8, "GUIDANCE": 5.0, "GUIDANCE_INTERVAL": [0.25, 0.75]},
    {"PROMPT": PROMPTS, "SEED": [3, 4, 5], "STEPS": 4, "GUIDANCE": 3.0, "NEGATIVE_PROMPT": "a circle"},
    {"PROMPT": PROMPTS[1], "SEED": 8, "STEPS": 8, "GUIDANCE": 5.0, "CACHE_EVERY": 3, "FULL_STEPS": 2},
    {"PROMPT": PROMPTS[1], "SEED": 9, "STEPS": 4, "GUIDANCE": 5.0, "GUIDANCE_RESCALE": 0.7},
    {"PROMPT": PROMPTS[2], "SEED": 2**40, "STEPS": 6, "HEIGHT": 96, "WIDTH": 64, "ETA": 1.0},
    {"PROMPT": PROMPTS[:2], "SEED": -7, "STEPS": 3, "IMAGES_PER_PROMPT": 2, "NEGATIVE_PROMPT": ["red", "blue"]},
]


def request(wish: dict) -> Request:
    """The same request for this process; both take the model's defaults."""
    return Request(wish["PROMPT"], **{NAMES[name]: value for name, value in wish.items() if name in NAMES})


def apart(one: np.ndarray, other: np.ndarray) -> int:
    assert one.shape == other.shape and one.dtype == other.dtype == np.uint8
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("name", ["text_encoder", "cross_attention_kv", "time_embedding", "unet", "decoder"])
@pytest.mark.parametrize("api", [tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def test_a_component_alone_gives_what_it_gives_here(triton_server, local: LatentDiffusionPipeline, name, api) -> None:
    backend = local.backends[name]
    for rows, size in ((2, 8), (3, 12)):
        feed = {}
        for spec in backend.inputs:
            shape = [
                rows if index == 0 else dim if isinstance(dim, int) else size for index, dim in enumerate(spec.shape)
            ]
            values = np.random.default_rng(rows).standard_normal(shape)
            feed[spec.name] = (
                (abs(values) * 20).astype(np.int64) if spec.dtype == "int64" else values.astype(np.float32)
            )
        kinds = {"int64": "INT64", "float32": "FP32"}
        url = triton_server.http if api is tritonclient.http else triton_server.grpc
        with api.InferenceServerClient(url) as client:
            inputs = [
                tensor(
                    api,
                    spec.name,
                    feed[spec.name].reshape(rows, -1) if feed[spec.name].ndim == 1 else feed[spec.name],
                    kinds[spec.dtype],
                )
                for spec in backend.inputs
            ]
            result = client.infer(name, inputs)
        for output, expected in backend.run(feed).items():
            assert np.array_equal(result.as_numpy(output), expected)


def test_rows_of_many_callers_share_a_call_of_a_component(triton_server, local) -> None:
    feeds = [dummy_inputs(local.model.components["text_encoder"], seed=seed) for seed in range(32)]
    with ThreadPoolExecutor(32) as threads:
        results = list(threads.map(lambda feed: _infer(triton_server, "text_encoder", feed), feeds))
    for feed, result in zip(feeds, results, strict=True):
        expected = local.backends["text_encoder"].run(feed)["context"]
        assert np.abs(result.as_numpy("context") - expected).max() < 1e-4
    counts = {
        (line.partition("{")[0], 'model="text_encoder"' in line): float(line.rpartition(" ")[2])
        for line in _metrics(triton_server)
        if line.startswith(("nv_inference_count", "nv_inference_exec_count")) and 'model="text_encoder"' in line
    }
    assert counts["nv_inference_exec_count", True] < counts["nv_inference_count", True]


def _infer(server: TritonServer, name: str, feed: dict[str, np.ndarray]):
    api = tritonclient.http
    with api.InferenceServerClient(server.http) as client:
        return client.infer(name, [tensor(api, key, array, "INT64") for key, array in feed.items()])


def _metrics(server: TritonServer) -> list[str]:
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        return answer.read().decode().splitlines()


@pytest.mark.parametrize("wish", WISHES, ids=range(len(WISHES)))
def test_the_same_seed_gives_the_same_bytes_as_here(triton_server, local_images: Draw, wish: dict) -> None:
    result = over_http(triton_server.http, wish)
    assert np.array_equal(result.as_numpy("IMAGE"), local_images(request(wish)))
    assert result.as_numpy("IMAGE").std() > 5 and result.as_numpy("PNG") is None


@pytest.mark.parametrize("asked", [{"BUDGET": 30.0}, {"BUDGET": 30.0, "AUTO_STEPS": True}])
def test_a_budget_takes_a_measured_setting_of_the_loaded_precision(
    triton_server, local_images: Draw, asked: dict
) -> None:
    result = over_http(triton_server.http, {"PROMPT": PROMPTS[0], "SEED": 4, **asked})
    expected = local_images(Request(PROMPTS[0], seed=4, **CLOSE.setting.options))
    assert np.array_equal(result.as_numpy("IMAGE"), expected)


def test_png_and_the_seed_over_grpc(triton_server, grpc: Grpc, local_images: Draw) -> None:
    wish = {"PROMPT": PROMPTS[:2], "STEPS": 3}
    result = grpc.ask(wish, ("PNG", "SEED_USED")).result()
    (seed,) = result.as_numpy("SEED_USED").tolist()
    images = [np.asarray(Image.open(io.BytesIO(png))) for png in result.as_numpy("PNG")]
    assert np.array_equal(np.stack(images), local_images(request(wish | {"SEED": seed})))
    other = grpc.ask(wish, ("SEED_USED",)).result().as_numpy("SEED_USED").tolist()
    assert other != [seed]  # a fresh one each time


def test_plain_http_and_json_are_enough(triton_server, local_images: Draw) -> None:
    prompt = {"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": [PROMPTS[0]]}
    steps = {"name": "STEPS", "shape": [1], "datatype": "INT32", "data": [2]}
    seed = {"name": "SEED", "shape": [1], "datatype": "INT64", "data": [9]}
    document = {"inputs": [prompt, steps, seed], "outputs": [{"name": "IMAGE"}]}
    status, answer = post(triton_server.http, "/v2/models/ldm/infer", document)
    (image,) = answer["outputs"]
    assert status == 200 and image["datatype"] == "UINT8"
    results = np.array(image["data"], np.uint8).reshape(image["shape"])
    expected = local_images(Request(PROMPTS[0], seed=9, num_inference_steps=2))
    assert np.array_equal(results, expected)
    document["outputs"] = [{"name": "PNG_BASE64"}]
    (png,) = post(triton_server.http, "/v2/models/ldm/infer", document)[1]["outputs"]
    first_image = Image.open(io.BytesIO(base64.b64decode(png["data"][0])))
    assert np.array_equal(np.asarray(first_image), expected[0])
    del document["outputs"]
    names = [output["name"] for output in post(triton_server.http, "/v2/models/ldm/infer", document)[1]["outputs"]]
    assert sorted(names) == ["IMAGE", "SEED_USED"]


def test_a_stream_reports_each_step_and_sends_previews(triton_server, grpc: Grpc, local_images: Draw) -> None:
    wish = {"PROMPT": PROMPTS[1], "SEED": 2, "STEPS": 10, "PREVIEW_EVERY": 4}
    answers = list(grpc.stream(wish, ("STEP", "TOTAL", "IMAGE", "SEED_USED")))
    assert [answer.as_numpy("STEP").tolist() for answer in answers] == [[step] for step in range(1, 11)]
    assert all(answer.as_numpy("TOTAL").tolist() == [10] for answer in answers)
    preview_steps = [answer.as_numpy("STEP")[0] for answer in answers if answer.as_numpy("IMAGE") is not None]
    assert preview_steps == [4, 8, 10]
    last = answers[-1].as_numpy("IMAGE")
    assert np.array_equal(last, local_images(request(wish))) and answers[-1].as_numpy("SEED_USED").tolist() == [2]
    distances = [np.abs(answers[step - 1].as_numpy("IMAGE").astype(int) - last).mean() for step in (4, 8)]
    assert distances[1] < distances[0]


def test_a_stream_sends_png_and_says_which_image_is_final(triton_server, grpc: Grpc, local_images: Draw) -> None:
    wish = {"PROMPT": PROMPTS[1], "SEED": 2, "STEPS": 5, "PREVIEW_EVERY": 2}
    answers = list(grpc.stream(wish, ("PNG", "FINAL")))
    images = [answer for answer in answers if answer.as_numpy("PNG") is not None]
    assert [bool(answer.as_numpy("FINAL")[0]) for answer in images] == [False, False, True]
    (final,) = (np.asarray(Image.open(io.BytesIO(png))) for png in images[-1].as_numpy("PNG"))
    assert np.array_equal(final, local_images(request(wish))[0])


def test_metrics_are_up_to_date_when_the_last_response_is_out(triton_server, grpc: Grpc) -> None:
    before = triton_server.figures().get('ldm_requests_total{outcome="done"}', 0)
    for ask in [grpc.ask({"PROMPT": PROMPTS[0], "SEED": seed, "STEPS": 2}) for seed in range(8)]:
        ask.result()
    after = triton_server.figures()
    assert after["ldm_running_requests"] == 0
    assert after['ldm_requests_total{outcome="done"}'] == before + 8


def test_a_stream_over_plain_http(triton_server) -> None:
    body = json.dumps({"PROMPT": PROMPTS[0], "STEPS": 3, "SEED": 1}).encode()
    url = f"http://{triton_server.http}/v2/models/ldm_stream/generate_stream"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=60) as answer:
        events = [json.loads(line[len(b"data: ") :]) for line in answer if line.startswith(b"data: ")]
    assert [event["STEP"] for event in events] == [1, 2, 3] and len(events[-1]["IMAGE"]) == 64 * 64 * 3


def test_74_mixed_requests_at_once_give_what_each_gives_alone(triton_server, grpc: Grpc, local_images: Draw) -> None:
    singles = [wish for wish in WISHES if not isinstance(wish["PROMPT"], list)]
    wishes = [wish | {"SEED": number // 5} for number in range(10) for wish in singles]
    wishes += [wish for _ in range(2) for wish in WISHES if wish not in singles]
    assert len(wishes) == 74
    before = triton_server.figures()
    results = [ask.result().as_numpy("IMAGE") for ask in [grpc.ask(wish) for wish in wishes]]
    expected: dict[str, np.ndarray] = {}
    for wish, image in zip(wishes, results, strict=True):
        key = repr(wish)
        expected[key] = expected[key] if key in expected else local_images(request(wish))
        assert apart(image, expected[key]) <= 1
    after = triton_server.figures()
    calls = after["ldm_unet_calls_total"] - before["ldm_unet_calls_total"]
    assert calls < sum(wish["STEPS"] for wish in wishes) / 2  # they shared them


def test_concurrent_responses_all_arrive(grpc: Grpc) -> None:
    wish = {"PROMPT": PROMPTS[0], "SEED": 1, "STEPS": 1}
    first = grpc.ask(wish).result().as_numpy("IMAGE")
    for _ in range(20):
        for ask in [grpc.ask(wish) for _ in range(16)]:
            assert apart(ask.result().as_numpy("IMAGE"), first) <= 1
