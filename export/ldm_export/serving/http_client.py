"""HTTP client for a Triton server that limits the time and the size of responses, whatever the server sends.

tritonclient's own HTTP client limits only the time between two parts of a response. This client has the methods of it
that are used here, and uses tritonclient to encode and decode bodies.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import tritonclient.http
from tritonclient.utils import InferenceServerException

from ldm_export.serving.address import Address

__all__ = ["HttpClient"]

DESCRIBE_SECONDS = 30.0
"""Seconds for a response without images."""
MAX_JSON, MAX_IMAGES = 16 * 2**20, 2**30
"""Maximum size in bytes of a response without and with images."""
PART = 2**20


class HttpClient:
    """The used methods of ``tritonclient.http.InferenceServerClient``, with a new connection for each request.

    Args:
        address: Address of the server.
        seconds: Seconds for a response with images.

    The methods raise ``TimeoutError`` if the whole response does not arrive in time, ``InferenceServerException`` if
    the server responds with an error, ``OSError`` or ``http.client.HTTPException`` if the connection fails, and
    ``ValueError`` for a response that is too large or not valid.
    """

    def __init__(self, address: Address, seconds: float):
        self._address, self._seconds = address, seconds

    def is_server_live(self) -> bool:
        """True if the server is live."""
        return self._exchange("GET", "/v2/health/live")[0] == 200

    def is_model_ready(self, model: str) -> bool:
        """True if a model is ready."""
        return self._exchange("GET", f"/v2/models/{quote(model, safe='')}/ready")[0] == 200

    def get_model_metadata(self, model: str) -> Any:
        """Inputs and outputs of a model."""
        return self._document("GET", f"/v2/models/{quote(model, safe='')}")

    def get_model_repository_index(self) -> Any:
        """All models of the server and their states."""
        return self._document("POST", "/v2/repository/index")

    def infer(self, model: str, inputs: list[Any], outputs: list[Any], **options: Any) -> Any:
        """Send a request and return its result, which has ``as_numpy``."""
        client = tritonclient.http.InferenceServerClient
        body, header_size = client.generate_request_body(inputs, outputs=outputs, **options)
        headers = {} if header_size is None else {"Inference-Header-Content-Length": str(header_size)}
        path = f"/v2/models/{quote(model, safe='')}/infer"
        status, answered, content = self._exchange("POST", path, body, headers)
        _raise_if_error(status, content)
        size = answered.get("Inference-Header-Content-Length")
        return client.parse_response_body(content, header_length=None if size is None else int(size))

    def close(self) -> None:
        """Nothing to close."""

    def _document(self, method: str, path: str) -> Any:
        status, _, content = self._exchange(method, path)
        _raise_if_error(status, content)
        return json.loads(content)

    def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send a request and return status, headers and body of the response. Requests for images have a body."""
        seconds, limit = (DESCRIBE_SECONDS, MAX_JSON) if body is None else (self._seconds, MAX_IMAGES)
        host, port = self._address.host, self._address.port
        connection = (
            http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl.create_default_context())
            if self._address.secure
            else http.client.HTTPConnection(host, port, timeout=seconds)
        )
        overdue = threading.Event()
        try:
            connection.connect()
            timer = threading.Timer(seconds, _end, (connection.sock, overdue))
            timer.daemon = True
            timer.start()
            try:
                connection.request(method, path, body, dict(headers or {}))
                answer = connection.getresponse()
                content = _read(answer, limit)
            finally:
                timer.cancel()
            if not overdue.is_set():
                return answer.status, answer.headers, content
        except (OSError, http.client.HTTPException, ValueError):
            if not overdue.is_set():
                raise
        finally:
            connection.close()
        raise TimeoutError(f"no whole answer in {seconds:g} s")


def _end(connected: Any, overdue: threading.Event) -> None:
    """Shut a connection down, so that a thread that reads from it stops waiting."""
    overdue.set()
    with suppress(OSError):  # it has ended by itself
        connected.shutdown(socket.SHUT_RDWR)


def _read(answer: http.client.HTTPResponse, limit: int) -> bytes:
    """Read a body of at most ``limit`` bytes."""
    parts, size = [], 0
    while part := answer.read(PART):
        size += len(part)
        if size > limit:
            raise ValueError(f"the answer has more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


def _raise_if_error(status: int, content: bytes) -> None:
    if status == 200:
        return
    try:
        message = json.loads(content)["error"]
    except (ValueError, LookupError, TypeError, RecursionError):
        message = content[:200].decode(errors="replace") or "no message"
    raise InferenceServerException(msg=str(message), status=str(status))
