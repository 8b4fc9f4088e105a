"""Requests that the server refuses or that are cancelled: each gets one clear line, and the server stays ready."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from ldm_runtime import LatentDiffusionPipeline
from tests.support.triton_client import Grpc, over_http, post, tensor
from tests.support.triton_server import TritonServer
from tests.support.waiting import wait_until

PROMPT = "a large red circle in the center on a white background"
CHECK = {
    "parameters": {"check": True},
    "inputs": [{"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": ["x"]}],
}


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"PROMPT": []}, "prompts: got an empty list"),
        ({"PROMPT": b"\xff\xfe"}, "PROMPT 0: is not UTF-8"),
        ({"PROMPT": "a" * 50_001}, "50001 characters"),
        ({"PROMPT": ["a"] * 33}, "images: got 33 in one call"),
        ({"PROMPT": ["a"] * 32}, "need 64 rows of a UNet call"),
        ({"PROMPT": PROMPT, "STEPS": 0}, "steps: got 0"),
        ({"PROMPT": PROMPT, "STEPS": [3, 4]}, "STEPS"),
        ({"PROMPT": PROMPT, "STEPS": 2**31 - 1}, "steps: got 2147483647"),
        ({"PROMPT": PROMPT, "ETA": -1.0}, "eta: got -1"),
        ({"PROMPT": PROMPT, "ETA": float("nan")}, "eta: got nan"),
        ({"PROMPT": PROMPT, "GUIDANCE": float("inf")}, "guidance_scale: got inf"),
        ({"PROMPT": PROMPT, "HEIGHT": 65}, "height: got 65"),
        ({"PROMPT": PROMPT, "WIDTH": 1 << 20}, "width: got 1048576"),
        ({"PROMPT": PROMPT, "SEED": [1, 2]}, "seed: got 2 seeds for 1 images"),
        ({"PROMPT": PROMPT, "NEGATIVE_PROMPT": ["a", "b"]}, "negative_prompt: got 2 for 1 prompts"),
        ({"PROMPT": PROMPT, "PRIORITY": 9}, "priority: got 9"),
        ({"PROMPT": PROMPT, "TIMEOUT": 0.0}, "timeout: got 0"),
        ({"PROMPT": PROMPT, "GUIDANCE_EVERY": 0}, "guidance_every: got 0"),
        ({"PROMPT": PROMPT, "GUIDANCE_INTERVAL": [0.6, 0.4]}, "guidance_interval: got 0.6 to 0.4"),
        ({"PROMPT": PROMPT, "BUDGET": 30.0, "STEPS": 5}, "budget: got 30 dB and steps too, but a measured setting"),
        ({"PROMPT": PROMPT, "AUTO_STEPS": True, "STEPS": 5}, "AUTO_STEPS: got true and STEPS too"),
        ({"PROMPT": PROMPT, "AUTO_STEPS": True}, "steps: got auto without a budget"),
        ({"PROMPT": PROMPT, "IMAGES_PER_PROMPT": 0}, "images_per_prompt: got 0"),
    ],
)
def test_a_bad_request_is_refused_with_a_reason(triton_server: TritonServer, wish: dict, message: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        over_http(triton_server.http, wish)
    assert message in caught.value.message() and "Traceback" not in caught.value.message()
    assert triton_server.ready() and post(triton_server.http, "/v2/models/ldm/infer", CHECK)[0] == 200


def test_a_component_reports_a_wrong_shape(triton_server: TritonServer, local: LatentDiffusionPipeline) -> None:
    api, unet = tritonclient.http, local.model.components["unet"]
    feed = {spec.name: np.zeros((1, *spec.bounds("opt")[1:]), np.float32) for spec in unet.inputs}
    channels = feed["sample"].shape[1]
    with api.InferenceServerClient(triton_server.http) as client:
        for sample, line in (
            (np.zeros((1, channels, 8, 1000), np.float32), "width must lie in"),
            (np.zeros((1, channels + 1, 8, 8), np.float32), "unexpected shape"),
        ):
            inputs = [tensor(api, name, array, "FP32") for name, array in (feed | {"sample": sample}).items()]
            with pytest.raises(InferenceServerException, match=line):
                client.infer("unet", inputs)
    assert triton_server.ready()


@pytest.mark.parametrize("body", [b"", b"{", b'{"inputs": []}', json.dumps({"inputs": [{"name": "PROMPT"}]}).encode()])
def test_a_body_that_is_no_request_is_a_client_error(triton_server: TritonServer, body: bytes) -> None:
    status, answer = post(triton_server.http, "/v2/models/ldm/infer", body)
    assert status >= 400 and "error" in answer
    assert triton_server.ready()


LONG = {"PROMPT": PROMPT, "STEPS": 1000, "HEIGHT": 256, "WIDTH": 256}
"""Half a minute and more."""


def test_a_cancelled_request_stops_soon(triton_server: TritonServer, grpc: Grpc) -> None:
    assert wait_until(lambda: triton_server.figures()["ldm_running_requests"] == 0)  # figures come twice a second
    before = triton_server.figures()
    pending = grpc.ask(LONG)
    assert wait_until(lambda: triton_server.figures()["ldm_running_requests"] > 0)
    pending.call.cancel()
    with pytest.raises(InferenceServerException, match=r"(?i)cancel"):
        pending.result()
    cancelled = 'ldm_requests_total{outcome="cancelled"}'
    assert wait_until(lambda: triton_server.figures()[cancelled] == before[cancelled] + 1)
    after = triton_server.figures()
    assert after["ldm_unet_calls_total"] - before["ldm_unet_calls_total"] < 900
    assert wait_until(lambda: triton_server.figures()["ldm_running_requests"] == 0)


def test_requests_that_are_cancelled_while_they_arrive(triton_server: TritonServer, grpc: Grpc) -> None:
    before = triton_server.figures()
    for index in range(8):
        pending = grpc.ask(LONG)
        time.sleep(0.004 * index)
        pending.call.cancel()
    grpc.ask({"PROMPT": PROMPT, "STEPS": 2}).result()
    assert wait_until(lambda: triton_server.figures()["ldm_running_requests"] == 0)
    assert triton_server.figures()["ldm_unet_calls_total"] - before["ldm_unet_calls_total"] < 900


def test_a_stream_that_is_closed_stops_soon(triton_server: TritonServer, grpc: Grpc) -> None:
    before = triton_server.figures()
    answers = grpc.stream(LONG, ("STEP",))
    assert next(answers).as_numpy("STEP").tolist() == [1]
    answers.close()
    cancelled = 'ldm_requests_total{outcome="cancelled"}'
    assert wait_until(lambda: triton_server.figures()[cancelled] == before[cancelled] + 1)
    assert triton_server.figures()["ldm_unet_calls_total"] - before["ldm_unet_calls_total"] < 900


def test_a_deadline_that_passes(triton_server: TritonServer, grpc: Grpc) -> None:
    wish = {"PROMPT": PROMPT, "STEPS": 1000, "TIMEOUT": 0.2}
    with pytest.raises(InferenceServerException, match=r"still running after its 0\.2"):
        grpc.ask(wish).result()
    with pytest.raises(InferenceServerException, match=r"still running after its 0\.2"):
        list(grpc.stream(wish, ("STEP",)))
    assert triton_server.ready()


def test_an_urgent_request_does_not_wait_for_those_that_wait(triton_server: TritonServer, grpc: Grpc) -> None:
    """More are asked for than run at once; the last, the most urgent, is among the first to be done."""
    wish = {"PROMPT": [PROMPT] * 8, "STEPS": 5}
    usual = [grpc.ask(wish | {"SEED": seed}) for seed in range(8)]
    assert wait_until(lambda: triton_server.figures()["ldm_queue_length"] > 3)
    grpc.ask({"PROMPT": PROMPT, "STEPS": 1, "PRIORITY": 0}).result()
    assert sum(pending.answers.empty() for pending in usual) >= 3
    for pending in usual:
        pending.result()


def test_the_figures_are_on_the_metrics_endpoint(triton_server: TritonServer) -> None:
    assert wait_until(lambda: triton_server.figures()["ldm_running_requests"] == 0)
    figures = triton_server.figures()
    assert figures["ldm_ready"] == 1 and figures["ldm_queue_length"] == 0
    assert figures["ldm_unet_rows_total"] > figures["ldm_unet_calls_total"] > 0
    assert 0 <= figures["ldm_batch_fill"] <= 1 and figures["ldm_steps_per_second"] >= 0
    for stage in ("encode", "unet", "noise", "step", "decode"):
        assert figures[f'ldm_stage_seconds_total{{stage="{stage}"}}'] > 0
    assert figures['ldm_requests_total{outcome="done"}'] > 0
