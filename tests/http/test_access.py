"""Who may use the server, how much of it, and what is logged and measured."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ldm_runtime.batching.metrics import COUNTERS, GAUGES
from ldm_runtime.errors import BackendError, SpecError
from ldm_runtime.http.image_store import ImageStore
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.http.server import serve
from ldm_runtime.http.server_metrics import SERVER_COUNTERS, SERVER_GAUGES
from ldm_runtime.http.server_options import ServerOptions
from tests.http.conftest import ENGINE, Served, open_models, running, stopped
from tests.support.waiting import wait_until

JSON = {"Content-Type": "application/json"}
REQUEST = {"model": "text", "prompt": "a circle", "steps": 2}


def call(
    server: Served, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def generate(server: Served, headers: Mapping[str, str] = JSON, **fields: Any) -> tuple[int, str]:
    return call(server, "POST", "/v1/images/generations", json.dumps({**REQUEST, **fields}).encode(), headers)


def test_other_pages_and_names_that_resolve_to_this_machine_are_refused(served: Served) -> None:
    own = served.url.removeprefix("http://")
    assert generate(served, {**JSON, "Origin": served.url})[0] == 200
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        status, text = generate(served, {**JSON, "Host": own, **headers})
        assert status == 403 and json.loads(text)["error"]["code"] == "forbidden"


BODIES: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "no JSON": (b"{", JSON, 400, "cannot be read as JSON"),
    "a list": (b"[]", JSON, 400, "expected one JSON object"),
    "text": (b"{}", {"Content-Type": "text/plain"}, 415, "expected application/json"),
    "no prompt": (b'{"model": "text"}', JSON, 400, "prompt: got none"),
    "a number": (b'{"model": "text", "prompt": 3}', JSON, 400, "prompt: got 3, expected a text"),
    "another model": (b'{"model": ["text"], "prompt": "a"}', JSON, 404, "expected one of text, plain"),
    "large": (b" " * 2000, JSON, 413, "expected at most 1000 bytes"),
}


@pytest.fixture(scope="module")
def small(models: dict[str, ServedModel]) -> Any:
    options = ServerOptions(max_body_bytes=1000, max_pixels=600, max_images=3)
    with running(models, options) as server:
        yield server


@pytest.mark.parametrize("case", BODIES)
def test_bodies(small: Served, case: str) -> None:
    body, headers, expected, message = BODIES[case]
    status, text = call(small, "POST", "/v1/images/generations", body, headers)
    assert status == expected and message in json.loads(text)["error"]["message"]


def test_a_body_that_nests_deeply(served: Served) -> None:
    status, text = call(served, "POST", "/v1/images/generations", b"[" * 100_000, JSON)
    assert status == 400 and json.loads(text)["error"]["code"] == "invalid_json"


def test_a_body_of_unknown_length_is_limited_too(small: Served) -> None:
    address = urlsplit(small.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_pixels_and_images_are_limited(small: Served) -> None:
    assert generate(small, size="24x16", n=1)[0] == 200
    for fields, name in (({"size": "24x16", "n": 2}, "size"), ({"n": 4}, "n")):
        status, text = generate(small, **fields)
        assert status == 400 and json.loads(text)["error"]["param"] == name


def test_unknown_paths_and_methods(served: Served) -> None:
    assert call(served, "GET", "/nowhere")[0] == 404
    status, text = call(served, "GET", "/v1/images/generations")
    assert status == 405 and json.loads(text)["error"]["code"] == "http_error"
    status, text = call(served, "POST", "/v1/images/edits", b"{}", JSON)
    assert status == 415 and "multipart/form-data" in text
    form = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert "image: got none" in call(served, "POST", "/v1/images/edits", form, headers)[1]
    assert call(served, "POST", "/v1/images/edits", b"garbage", headers)[0] == 400


def test_requests_of_one_client_are_limited(models: dict[str, ServedModel], cancelled: threading.Event) -> None:
    with running(models, ServerOptions(max_client_requests=1)) as server:
        address = urlsplit(server.url)
        body = json.dumps({**REQUEST, "steps": 1000, "stream": True, "progress": True})
        slow = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        with stopped(models["text"]) as gate:
            slow.request("POST", "/v1/images/generations", body, JSON)
            gate.wait_for_call()
            status, text = generate(server)
            assert status == 429 and json.loads(text)["error"]["code"] == "too_many_requests"
            slow.close()
            assert cancelled.wait(60)
        assert wait_until(lambda: generate(server)[0] == 200)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_cancels_its_request(served: Served, cancelled: threading.Event, stream: bool) -> None:
    address, scheduler = urlsplit(served.url), served.models["text"].scheduler
    before = scheduler.snapshot().outcomes["cancelled"]
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    body = json.dumps({**REQUEST, "steps": 1000, "stream": stream, "progress": True})
    with stopped(served.models["text"]) as gate:
        connection.request("POST", "/v1/images/generations", body, JSON)
        gate.wait_for_call()
        connection.close()
        assert cancelled.wait(60)
    assert wait_until(lambda: scheduler.snapshot().outcomes["cancelled"] == before + 1)


def test_the_log_names_the_request(served: Served) -> None:
    def logged(name: str, value: object) -> list[dict[str, Any]]:  # requests of earlier tests may still be logged
        return [line for line in map(json.loads, list(served.log)) if line.get(name) == value]

    served.log.clear()
    assert generate(served, n=2)[0] == 200 and call(served, "GET", "/nowhere?secret")[0] == 404
    assert wait_until(lambda: logged("images", 2) and logged("path", "/nowhere"))
    (image,), (missing,) = logged("images", 2), logged("path", "/nowhere")
    assert (image["path"], image["status"], image["model"]) == ("/v1/images/generations", 200, "text")
    assert image["bytes"] > 1000 and image["seconds"] > 0 and image["client"] == "127.0.0.1"
    assert missing["path"] == "/nowhere" and missing["status"] == 404 and "model" not in missing


def test_metrics_are_those_of_triton(served: Served) -> None:
    generate(served)
    families = {family.name: family for family in text_string_to_metric_families(call(served, "GET", "/metrics")[1])}
    counters = {name.removesuffix("_total") for name in (*COUNTERS, *SERVER_COUNTERS)}
    assert set(families) == {*GAUGES, *SERVER_GAUGES, *counters}
    assert {sample.labels["model"] for sample in families["ldm_ready"].samples} == {"text", "plain"}
    done = {
        sample.labels["model"]: sample.value
        for sample in families["ldm_requests"].samples
        if sample.labels["outcome"] == "done"
    }
    assert done["text"] >= 1


def test_ready_only_while_images_can_be_generated(bundles: list[Path]) -> None:
    models = open_models(bundles[:1])
    with running(models) as server:
        assert call(server, "GET", "/readyz") == (200, "ready\n")
        models["text"].close()
        assert call(server, "GET", "/readyz") == (503, "not ready: text\n")
        assert call(server, "GET", "/healthz") == (200, "ok\n")
        status, text = generate(server)
        assert status == 503 and json.loads(text)["error"]["type"] == "server_error"


def test_a_queue_that_is_full(bundles: list[Path]) -> None:
    models = open_models(bundles[:1], replace(ENGINE, max_queue=1, max_rows=2))
    try:
        with running(models) as server:
            answers: list[int] = []
            threads = [threading.Thread(target=lambda: answers.append(generate(server)[0])) for _ in range(8)]
            with stopped(models["text"]) as gate:
                threads[0].start()
                gate.wait_for_call()
                for thread in threads[1:]:
                    thread.start()
                assert wait_until(lambda: answers == [429] * 6)
            for thread in threads:
                thread.join()
            assert answers == [*[429] * 6, 200, 200]
    finally:
        models["text"].close()


def test_options() -> None:
    assert ServerOptions(host="0.0.0.0", api_key="k" * 16).port == 8000
    for wrong, message in (
        ({"host": "0.0.0.0"}, "without a key, expected 127.0.0.1"),
        ({"api_key": "short"}, "16 to 512 printable"),
        ({"api_key": "with\na line break and more"}, "one line"),
        ({"port": 70000}, "port: got 70000"),
        ({"timeout": 0}, "timeout: got 0"),
        ({"max_images": 0}, "max-images: got 0"),
    ):
        with pytest.raises(SpecError, match=message):
            ServerOptions(**wrong)  # type: ignore[arg-type]


def test_bundles_of_one_name_and_bad_bundles(bundles: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="two folders named 'text'"):
        ServedModels.open([bundles[0], bundles[0]], ENGINE)
    with pytest.raises(Exception, match="no such folder"):
        ServedModels.open([bundles[0], tmp_path / "none"], ENGINE)


def test_an_address_in_use(served: Served) -> None:
    port = urlsplit(served.url).port
    with pytest.raises(BackendError, match=f"127.0.0.1:{port}: cannot listen"):
        serve(ServedModels([]), ServerOptions(port=port or 0), log=print, on_ready=print)


def test_kept_images_make_room() -> None:
    store = ImageStore(max_bytes=100)
    names = [store.add(bytes(40), "image/png") for _ in range(4)]
    assert [store.get(name) is not None for name in names] == [False, False, True, True]
    brief = ImageStore(seconds=0)
    assert brief.get(brief.add(b"x", "image/png")) is None
