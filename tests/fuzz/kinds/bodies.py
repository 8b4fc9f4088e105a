"""HTTP bodies to a Triton server with a small model: JSON and binary tensors of a request, changed."""

from __future__ import annotations

import atexit
import http.client
import json
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

from ldm_runtime.errors import MAX_MESSAGE, ServerError
from tests.fuzz.mutation import changed_bytes, changed_document
from tests.fuzz.outcome import Attempt
from tests.support.small_models import bundle_of, text_model
from tests.support.triton_server import served

__all__ = ["attempt_at", "prepare"]

REQUEST = {
    "id": "1",
    "parameters": {"check": False},
    "inputs": [
        {"name": "PROMPT", "shape": [1], "datatype": "BYTES", "data": ["a red circle"]},
        {"name": "SEED", "shape": [1], "datatype": "INT64", "data": [1]},
        {"name": "STEPS", "shape": [1], "datatype": "INT32", "data": [2]},
        {"name": "GUIDANCE", "shape": [1], "datatype": "FP32", "data": [3.0]},
        {"name": "GUIDANCE_INTERVAL", "shape": [2], "datatype": "FP32", "data": [0.0, 1.0]},
        {"name": "HEIGHT", "shape": [1], "datatype": "INT32", "data": [16]},
        {"name": "TIMEOUT", "shape": [1], "datatype": "FP32", "data": [30.0]},
    ],
    "outputs": [{"name": "SEED_USED"}, {"name": "PNG_BASE64"}],
}
BINARY = b"\x0c\0\0\0a red circle"
CALLERS_FAULT = range(400, 500)
BUSY = 503
TRITON = ("failed to parse", "Unable to parse", "failed to get request params", "parameter key")
"""Beginnings of the messages that Triton itself answers with 500, before a model sees the request."""


def prepare(folder: Path) -> Attempt:
    """Serve a small model; an input is the body of a request to it."""
    stack = ExitStack()
    atexit.register(stack.close)
    bundle_of(text_model(folder / "model"), folder / "bundle", ("unet",))
    return attempt_at(stack.enter_context(served(folder / "bundle", folder)).http)


def attempt_at(address: str) -> Attempt:
    """Inputs for a server at host:port. An answer is a failure if a model answers 500, or if it has no message."""

    def attempt(random: Random) -> None:
        document = REQUEST if random.random() < 0.2 else changed_document(random, REQUEST)
        headers, tail = {}, b""
        _bound_shapes(document)
        if random.random() < 0.2:
            document = {**REQUEST, "inputs": [_binary(random), *REQUEST["inputs"][1:]]}  # type: ignore[misc]
            tail = BINARY if random.random() < 0.5 else changed_bytes(random, BINARY)
        body = json.dumps(document).encode()
        if random.random() < 0.2:
            body = changed_bytes(random, body)
        if tail:
            headers["Inference-Header-Content-Length"] = str(len(body) + random.choice((0, 0, 0, 1, -1, 10**6)))
        connection = http.client.HTTPConnection(address, timeout=60)
        try:
            connection.request("POST", "/v2/models/ldm/infer", body + tail, headers)
            answer = connection.getresponse()
            status, text = answer.status, answer.read()
        finally:
            connection.close()
        if status == 200:
            return
        message = json.loads(text)["error"]
        refused = status in CALLERS_FAULT or status == BUSY or message.startswith(TRITON)
        assert message and refused, f"{status}: {text[:MAX_MESSAGE]!r}"
        raise ServerError(message)

    return attempt


def _bound_shapes(document: Any) -> None:
    """Triton allocates what a shape says before a model sees the request (SECURITY.md), so that shapes stay small."""
    inputs = document.get("inputs") if isinstance(document, dict) else None
    for tensor in inputs if isinstance(inputs, list) else ():
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        if isinstance(shape, list):
            tensor["shape"] = [min(size, 1000) if type(size) is int else size for size in shape]


def _binary(random: Random) -> dict[str, object]:
    size = len(BINARY) if random.random() < 0.7 else random.choice((0, 1, 2**31, -1, 2**63))
    return {"name": "PROMPT", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
