"""The client without a working server: addresses, output paths, and other programs that listen on a port."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldm_export.serving.address import Address, parse_url
from ldm_runtime.errors import SpecError
from tests.support.waiting import wait_until

Refused = Callable[..., None]
PROMPT = "a red circle"


@pytest.mark.parametrize(
    ("text", "protocol", "address"),
    [
        ("localhost", None, Address("localhost", 8000, "http")),
        ("localhost", "grpc", Address("localhost", 8001, "grpc")),
        ("10.0.0.1:80", None, Address("10.0.0.1", 80, "http")),
        ("https://pictures.example", None, Address("pictures.example", 8000, "http", secure=True)),
        ("grpcs://pictures.example:443/", "grpc", Address("pictures.example", 443, "grpc", secure=True)),
        ("grpc://[::1]:1", None, Address("::1", 1, "grpc")),
    ],
)
def test_addresses(text: str, protocol: str | None, address: Address) -> None:
    assert parse_url(text, protocol) == address
    assert parse_url(str(address)) == address


NO_ADDRESSES = ["", "http://", "ftp://x", "x:99999", "x:port", "http://u:p@x", "x/v2", "http://x?a=b", "a b", "[::1"]


@pytest.mark.parametrize("text", NO_ADDRESSES)
def test_no_addresses(text: str) -> None:
    with pytest.raises(SpecError, match=r"url: got .*, expected host, host:port, or one of http://host:port"):
        parse_url(text)


INVALID_REQUESTS = {
    "two protocols": (["--url", "http://x", "--protocol", "grpc"], "url: 'http://x' is for http, but --protocol is"),
    "a stream over HTTP": (["--url", "http://x", "--stream"], "url: http://x:8000 cannot stream; use gRPC"),
    "previews without a stream": (["--preview-every", "5"], "--preview-every: got no --stream"),
    "no time": (["--timeout", "0"], "timeout: got 0.0, expected a number of seconds above 0"),
    "not a number of seconds": (["--timeout", "nan"], "timeout: got nan, expected a number"),
    "a folder": (["-o", "."], ".: is a folder, expected the name of a file; choose another name"),
    "nobody's name": (["--url", "nowhere.invalid"], "http://nowhere.invalid:8000: cannot be reached ("),
}


@pytest.mark.parametrize("case", INVALID_REQUESTS)
def test_what_is_not_a_valid_request(refused: Refused, case: str) -> None:
    arguments, message = INVALID_REQUESTS[case]
    refused("client", PROMPT, *arguments, message=message)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_server_at_the_address(refused: Refused, protocol: str) -> None:
    url = f"{protocol}://127.0.0.1:{free_port()}"
    refused(
        "client", PROMPT, "--url", url, message=f"{url}: cannot be reached (Connection refused); start the server, or"
    )


@pytest.fixture(scope="module")
def web_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a web server that is no Triton."""
    port, folder = free_port(), tmp_path_factory.mktemp("web")
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            assert wait_until(lambda: listens(port))
            yield port
        finally:
            process.terminate()


@pytest.mark.parametrize(("scheme", "message"), [("http", "the server is not live"), ("grpc", "Failed parsing HTTP/2")])
def test_another_server_listens(refused: Refused, web_server: int, scheme: str, message: str) -> None:
    refused("client", PROMPT, "--url", f"{scheme}://127.0.0.1:{web_server}", message=message)


def test_neither_torch_nor_an_engine_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from ldm_export.cli import main; main(sys.argv[1:]);"
        "print({'torch', 'onnx', 'onnxruntime', 'openvino', 'tritonclient.http'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "client", PROMPT, "--url", f"127.0.0.1:{free_port()}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.stdout == "{'tritonclient.http'}\n" and "cannot be reached" in done.stderr


def listens(port: int) -> bool:
    """True if a server listens on a port of the loopback."""
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Drip(BaseHTTPRequestHandler):
    """Answers with a body that never ends: slowly, or as fast as it is read."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path != self.server.endless:  # type: ignore[attr-defined]
            body = METADATA if self.path == "/v2/models/ldm" else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Content-Length", str(10**12))
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(self.server.part)  # type: ignore[attr-defined]
                self.server.stop.wait(self.server.pause)  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


METADATA = json.dumps(
    {
        "inputs": [{"name": name, "datatype": kind} for name, kind in (("PROMPT", "BYTES"), ("SEED", "INT64"))]
        + [{"name": "TIMEOUT", "datatype": "FP32"}],
        "outputs": [{"name": "IMAGE"}],
    }
).encode()


@pytest.fixture
def endless() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads, server.stop = True, threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # it polls for its end
    yield server
    server.stop.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "part", "pause", "message"),
    [
        ("/v2/models/ldm/infer", b"x", 0.05, "no answer in 0.5 s; use a longer --timeout"),
        ("/v2/models/ldm", b"x", 0.05, "no answer in 0.5 s; use a longer --timeout"),
        ("/v2/models/ldm", b"x" * 2**20, 0, "the answer has more than 16777216 bytes"),
        ("/v2/models/ldm/infer", b"x" * 2**20, 0, "the answer has more than 3000000 bytes"),
    ],
)
def test_an_answer_without_end(
    refused: Refused, endless: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, path, part, pause, message
) -> None:
    endless.endless, endless.part, endless.pause = path, part, pause  # type: ignore[attr-defined]
    monkeypatch.setattr("ldm_export.serving.client.GRACE", 0.5)
    monkeypatch.setattr("ldm_export.serving.http_client.DESCRIBE_SECONDS", 1.0)
    monkeypatch.setattr("ldm_export.serving.http_client.MAX_IMAGES", 3_000_000)
    url = f"http://127.0.0.1:{endless.server_port}"
    refused("client", PROMPT, "--url", url, "--timeout", "0.5", "--quiet", message=message)
