"""Answers of a server to `ldm-export client`: status, headers and bodies of a Triton server over HTTP, changed."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import numpy as np

from ldm_export.cli import make_parser
from ldm_export.screen import Screen
from tests.fuzz.mutation import changed_bytes, changed_document
from tests.fuzz.outcome import Attempt

__all__ = ["prepare"]

METADATA = {
    "name": "ldm",
    "platform": "python",
    "inputs": [{"name": "PROMPT", "datatype": "BYTES", "shape": [-1]}]
    + [{"name": name, "datatype": "INT64", "shape": [1]} for name in ("SEED", "STEPS")]
    + [{"name": "TIMEOUT", "datatype": "FP32", "shape": [1]}],
    "outputs": [{"name": "IMAGE", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}],
}
IMAGE = np.arange(8 * 8 * 3, dtype=np.uint8).tobytes()
HEADER = {
    "model_name": "ldm",
    "model_version": "1",
    "outputs": [
        {"name": "IMAGE", "datatype": "UINT8", "shape": [1, 8, 8, 3], "parameters": {"binary_data_size": len(IMAGE)}}
    ],
}
INDEX = [{"name": "ldm", "version": "1", "state": "READY", "reason": ""}]
PATHS = ("/v2/health/live", "/v2/models/ldm/ready", "/v2/models/ldm", "/v2/models/ldm/infer", "/v2/repository/index")
STATUSES = (200, 200, 200, 201, 204, 301, 400, 404, 500, 503)
Answer = tuple[int, dict[str, str], bytes]


def prepare(folder: Path) -> Attempt:
    """Start a server that changes one answer at random; an input is a call of the client to it."""
    folder.mkdir(parents=True, exist_ok=True)
    answers: dict[str, Answer] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    arguments = ["client", "a", "--url", f"http://127.0.0.1:{server.server_port}", "--timeout", "5", "--quiet"]
    args = make_parser().parse_args([*arguments, "--seed", "1", "-o", str(folder / "out.png")])

    def attempt(random: Random) -> None:
        changed = random.choice(PATHS)
        for path in PATHS:
            answers[path] = _answer(random if path == changed else None, path)
        if changed == PATHS[-1]:  # asked for if the model is not ready
            answers["/v2/models/ldm/ready"] = (400, {"Content-Length": "0"}, b"")
        with contextlib.redirect_stdout(io.StringIO()):
            args.command(args, Screen(quiet=True))

    return attempt


def _answer(random: Random | None, path: str) -> Answer:
    """The answer of a working server, or a changed one."""
    documents: dict[str, object] = {"/v2/models/ldm": METADATA, "/v2/repository/index": INDEX}
    if path == "/v2/models/ldm/infer":
        document: object = HEADER if random is None or random.random() < 0.3 else changed_document(random, HEADER)
        header = json.dumps(document).encode()
        length, body = len(header), header + IMAGE
        if random is not None and random.random() < 0.3:
            length = random.choice((0, 1, length - 1, length + 1, 10**9, -1))
        headers = {"Inference-Header-Content-Length": str(length)}
    else:
        document = documents.get(path)
        if document is not None and random is not None and random.random() < 0.7:
            document = changed_document(random, document)
        body, headers = b"" if document is None else json.dumps(document).encode(), {}
    status = 200
    if random is not None:
        if random.random() < 0.3:
            body = changed_bytes(random, body)
        if random.random() < 0.2:
            status = random.choice(STATUSES)
            if random.random() < 0.5:
                body = json.dumps({"error": random.choice(("x" * 5000, "a\nb", None, 5, {"a": 1}))}).encode()
    size = len(body)
    if random is not None and random.random() < 0.05:
        size = random.choice((0, max(size - 1, 0), size + 1))
    return status, {**headers, "Content-Length": str(size), "Connection": "close"}, body
