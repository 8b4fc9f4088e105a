"""`ldm-export client` against a real Triton server: the right images, and one line for every refused request."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http
from PIL import Image

from ldm_export.cli import main
from ldm_runtime import Request
from tests.support.triton_server import TritonServer
from tests.support.waiting import wait_until

Refused = Callable[..., None]
PROMPT = "a large red circle in the center on a white background"


@pytest.fixture(params=["http", "grpc", "stream"])
def case(request: pytest.FixtureRequest, triton_server: TritonServer) -> list[str]:
    """Options that lead to the server in one of three ways."""
    stream = ["--stream"] if request.param == "stream" else []
    return ["--url", triton_server.http if request.param == "http" else f"grpc://{triton_server.grpc}", *stream]


def test_images_are_those_of_the_same_request_here(case: list[str], local_images, tmp_path: Path, capfd) -> None:
    other, place = "a small blue triangle in the center on a black background", tmp_path / "out.png"
    options = ["--seed", "3", "--steps", "6", "--eta", "0.5", "--guidance", "4", "--negative-prompt", "blue"]
    size = [
        "--guidance-every",
        "2",
        "--guidance-interval",
        "0",
        "0.8",
        "--height",
        "72",
        "--width",
        "56",
        "--images-per-prompt",
        "2",
        "--priority",
        "1",
    ]
    assert main(["client", PROMPT, other, *case, *options, *size, "--each", "-o", str(place)]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == [str(place), *(str(tmp_path / f"out-{index}.png") for index in range(4))]
    assert err == "seed 3\n"
    request = Request(
        [PROMPT, other],
        negative_prompt="blue",
        seed=3,
        eta=0.5,
        guidance_scale=4.0,
        guidance_every=2,
        guidance_interval=(0.0, 0.8),
        num_inference_steps=6,
        height=72,
        width=56,
        images_per_prompt=2,
    )
    for index, expected in enumerate(local_images(request)):
        image = np.asarray(Image.open(tmp_path / f"out-{index}.png"))
        assert image.shape == (72, 56, 3) and np.abs(image.astype(int) - expected).max() <= 1


def test_previews_come_before_the_image(triton_server: TritonServer, tmp_path: Path) -> None:
    url = ["--url", f"grpc://{triton_server.grpc}", "--stream", "--preview-every", "2", "--quiet"]
    assert main(["client", PROMPT, *url, "--steps", "6", "--seed", "1", "-o", str(tmp_path / "a.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a-4.png", "a.png"]


def test_server_refusals_are_one_line(refused: Refused, case: list[str]) -> None:
    for options, message in (
        (["--width", "63"], "width: got 63, expected a multiple of 8"),
        (["--guidance", "nan"], "guidance_scale: got nan, expected a finite number"),
        (["--priority", "9"], "priority: got 9, expected 0"),
        (["--steps", "1000", "--timeout", "0.2"], "not done in 0.2 s (request: still running after its 0.2"),
        (
            ["--model", "nowhere"],
            "has no model 'nowhere', but cross_attention_kv, decoder, ldm, ldm_stream, shallow_unet, text_enc",
        ),
        (["--model", "unet"], "has no input PROMPT, only sample, "),
        (["--seed", str(2**63)], "SEED: "),
        (["--negative-prompt", "\udcff"], "NEGATIVE_PROMPT: "),
    ):
        refused("client", PROMPT, *case, *options, message=message)


def test_a_model_that_is_not_ready(refused: Refused, triton_server: TritonServer) -> None:
    with tritonclient.http.InferenceServerClient(triton_server.http) as client:
        client.unload_model("ldm")
        try:
            while client.is_model_ready("ldm"):
                time.sleep(0.05)
            for url in (triton_server.http, f"grpc://{triton_server.grpc}"):
                refused("client", PROMPT, "--url", url, message="model 'ldm' is not ready (un")
        finally:
            client.load_model("ldm")


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["answer", "stream"])
def test_an_interrupt_cancels_the_request(triton_server: TritonServer, tmp_path: Path, stream: list[str]) -> None:
    cancelled = 'ldm_requests_total{outcome="cancelled"}'
    assert wait_until(lambda: triton_server.figures()["ldm_running_requests"] == 0)  # figures come twice a second
    before = triton_server.figures()[cancelled]
    url = ["--url", f"grpc://{triton_server.grpc}", *stream]
    command = [
        sys.executable,
        "-m",
        "ldm_export.cli",
        "client",
        PROMPT,
        "--steps",
        "1000",
        "--height",
        "256",
        "--width",
        "256",
        *url,
    ]
    interruptible = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, **interruptible) as process:
        while triton_server.figures()["ldm_running_requests"] == 0:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "ldm-export: interrupted\n") and not list(tmp_path.iterdir())
    assert wait_until(lambda: triton_server.figures()[cancelled] == before + 1)
