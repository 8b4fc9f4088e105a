"""Operating a Triton server: new versions under load, a full queue, a killed model, a restart.

These tests rewrite the repository and stop the server, which is this module's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from ldm_export.cli import main
from ldm_runtime import Request
from tests.support.triton_client import Grpc, over_http, post
from tests.support.triton_server import TritonServer, served
from tests.support.waiting import wait_until

PROMPT = "a large red circle in the center on a white background"
WISH = {"PROMPT": PROMPT, "SEED": 5, "STEPS": 8}
CHECK = {
    "parameters": {"check": True},
    "inputs": [{"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": ["x"]}],
}


@pytest.fixture(scope="module")
def expected(local_images: Callable[[Request], np.ndarray]) -> np.ndarray:
    return local_images(Request(PROMPT, seed=5, num_inference_steps=8))


@pytest.fixture(scope="module")
def own_server(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that only this module's tests use."""
    with served(shapes_bundle, tmp_path_factory.mktemp("lifecycle")) as running:
        yield running


@pytest.fixture(scope="module")
def usual_config(own_server: TritonServer) -> str:
    """The config of the served model before any test changes it."""
    return config_of(own_server)


@pytest.fixture
def ready_server(own_server: TritonServer, usual_config: str) -> TritonServer:
    """The module's server, ready, with the options that the test before has left."""
    if not wait_until(own_server.ready, 3):  # it is not while it takes an old version out of service
        own_server.stop()
        own_server.start()
    return own_server


@pytest.fixture
def server(usual_config: str, ready_server: TritonServer, shapes_bundle: Path) -> TritonServer:
    """The module's server, ready, with the shipped model and its usual options."""
    if config_of(ready_server) != usual_config:
        write(shapes_bundle, ready_server)
        load(ready_server, "ldm_stream", "ldm")
    return ready_server


def config_of(server: TritonServer) -> str:
    return (server.repository / "ldm_stream" / "config.pbtxt").read_text()


def write(bundle: Path, server: TritonServer, *options: str) -> None:
    usual = ["--backend", "onnxruntime", "--precision", "fp32", "--quiet"]
    assert main(["triton", str(bundle), "-o", str(server.repository), *usual, *options]) == 0


def load(server: TritonServer, *names: str) -> None:
    with tritonclient.http.InferenceServerClient(server.http, network_timeout=120) as client:
        for name in names:
            client.load_model(name)


def test_loading_a_new_version_under_load_loses_no_request(server, shapes_bundle, expected) -> None:
    results, failed, enough = [], [], threading.Event()

    def keep_asking() -> None:
        while not enough.is_set():
            try:
                result = over_http(server.http, WISH)
                results.append((result.get_response()["model_version"], result.as_numpy("IMAGE")))
            except Exception as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    write(shapes_bundle, server)
    load(server, "ldm_stream", "ldm")
    over_http(server.http, WISH)
    enough.set()
    for thread in threads:
        thread.join(120)
    assert not failed
    versions = [int(version) for version, _ in results]
    assert min(versions) < max(versions)
    assert all(np.abs(image.astype(int) - expected).max() <= 1 for _, image in results)


def test_a_full_queue_refuses_requests_and_completes_the_others(ready_server, shapes_bundle) -> None:
    server = ready_server
    write(shapes_bundle, server, "--max-queue", "2", "--max-rows", "2")
    load(server, "ldm_stream", "ldm")
    grpc = Grpc(server.grpc)
    pending = [grpc.ask(WISH | {"STEPS": 50}) for _ in range(12)]
    done, refused = 0, []
    for each in pending:
        try:
            each.result()
            done += 1
        except InferenceServerException as error:
            refused.append(error.message())
    grpc.client.close()
    assert done >= 3 and refused and all("2 requests are waiting already" in text for text in refused)
    assert wait_until(lambda: server.figures()['ldm_requests_total{outcome="refused"}'] == len(refused))


def test_per_step_serving_gives_the_same_image(ready_server, shapes_bundle, expected) -> None:
    server = ready_server
    write(shapes_bundle, server, "--per-step")
    load(server, "unet", "ldm_stream", "ldm")
    answers = (post(server.http, "/v2/models/ldm/infer", CHECK)[0] == 200 or time.sleep(0.1) for _ in range(300))
    assert any(answers)  # the first self-test runs after loading, when `unet` can be called
    assert np.array_equal(over_http(server.http, WISH).as_numpy("IMAGE"), expected)


def test_a_damaged_version_does_not_become_ready_and_the_old_one_keeps_serving(server, shapes_bundle) -> None:
    """Its files are checked and a test image is generated; the previous version stays in service."""
    write(shapes_bundle, server)
    (newest,) = sorted(server.repository.glob("ldm_stream/[0-9]*"), key=lambda path: int(path.name))[-1:]
    graph = newest / "bundle" / "decoder" / "fp32.onnxruntime-cpu.onnx"
    content = graph.read_bytes()
    graph.unlink()  # a link: the others keep theirs
    graph.write_bytes(content[:-1])
    with pytest.raises(InferenceServerException, match=r"decoder/fp32\.onnxruntime-cpu\.onnx: got"):
        load(server, "ldm_stream")
    over_http(server.http, WISH)
    assert not server.ready()  # so Triton tells of the version that failed, until it is started again
    write(shapes_bundle, server)
    load(server, "ldm_stream", "ldm")
    over_http(server.http, WISH)


def test_a_stopped_server_finishes_running_requests_and_restarts(server, expected) -> None:
    grpc = Grpc(server.grpc)
    pending = grpc.ask(WISH | {"STEPS": 100})
    first = over_http(server.http, WISH)
    server.stop()
    assert pending.result().as_numpy("IMAGE").shape == (1, 64, 64, 3) and first is not None
    grpc.client.close()
    assert not server.ready()
    server.start()
    assert np.array_equal(over_http(server.http, WISH).as_numpy("IMAGE"), expected)


def test_a_killed_model_process_is_reported_and_recovers_when_loaded_again(server, expected) -> None:
    """It is unloaded first: Triton does not load a model again whose files have not changed."""
    session = ["ps", "-ww", "-o", "pid=,args=", "-s", str(server.process.pid)]
    children = subprocess.run(session, capture_output=True, text=True, check=True).stdout.splitlines()
    stubs = [line for line in children if "/ldm_stream/" in line]
    newest = max(stubs, key=lambda line: int(line.partition("/ldm_stream/")[2].partition("/")[0]))
    os.kill(int(newest.split()[0]), signal.SIGKILL)
    with pytest.raises(InferenceServerException, match="not healthy"):
        over_http(server.http, WISH)
    assert post(server.http, "/v2/models/ldm/infer", CHECK)[0] != 200
    with tritonclient.http.InferenceServerClient(server.http, network_timeout=120) as client:
        client.unload_model("ldm_stream")
    load(server, "ldm_stream")
    assert np.array_equal(over_http(server.http, WISH).as_numpy("IMAGE"), expected)
