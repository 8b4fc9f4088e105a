"""Requests to a Triton server as its users make them: with tritonclient, or with plain HTTP and JSON."""

from __future__ import annotations

import json
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

KINDS = {
    "PROMPT": "BYTES",
    "NEGATIVE_PROMPT": "BYTES",
    "SCHEDULER": "BYTES",
    "LORAS": "BYTES",
    "SEED": "INT64",
    **dict.fromkeys(("STEPS", "HEIGHT", "WIDTH", "IMAGES_PER_PROMPT", "PRIORITY", "PREVIEW_EVERY"), "INT32"),
    **dict.fromkeys(("COUNT", "GUIDANCE_EVERY", "CLIP_SKIP", "PROMPT_CHUNKS", "CACHE_EVERY", "FULL_STEPS"), "INT32"),
    **dict.fromkeys(("PROMPT_WEIGHTS", "AUTO_STEPS"), "BOOL"),
    **dict.fromkeys(("ETA", "GUIDANCE", "GUIDANCE_INTERVAL", "GUIDANCE_RESCALE", "TIMEOUT", "BUDGET"), "FP32"),
}
DTYPES = {"BYTES": object, "BOOL": np.bool_, "INT64": np.int64, "INT32": np.int32, "FP32": np.float32}
WAIT = 120
"""Timeout of one response in seconds."""


def tensors(api: Any, wish: dict[str, Any]) -> list[Any]:
    """Inputs of `ldm` from plain values or lists of them."""
    inputs = []
    for name, value in wish.items():
        listed = value if isinstance(value, list) else [value]
        listed = [text.encode() if isinstance(text, str) else text for text in listed]
        inputs.append(tensor(api, name, np.array(listed, DTYPES[KINDS[name]]), KINDS[name]))
    return inputs


def tensor(api: Any, name: str, array: np.ndarray, kind: str) -> Any:
    result = api.InferInput(name, list(array.shape), kind)
    result.set_data_from_numpy(array)
    return result


def requested_outputs(api: Any, outputs: tuple[str, ...]) -> list[Any]:
    return [api.InferRequestedOutput(name) for name in outputs]


def over_http(url: str, wish: dict[str, Any], outputs: tuple[str, ...] = ("IMAGE",), model: str = "ldm") -> Any:
    """Send one request over HTTP and return the result, which has ``as_numpy``."""
    api = tritonclient.http
    with api.InferenceServerClient(url, network_timeout=WAIT, connection_timeout=WAIT) as client:
        return client.infer(model, tensors(api, wish), outputs=requested_outputs(api, outputs))


class Grpc:
    """A gRPC connection, for several requests at once."""

    def __init__(self, url: str):
        self._api = tritonclient.grpc
        self.client = self._api.InferenceServerClient(url)

    def ask(self, wish: dict[str, Any], outputs: tuple[str, ...] = ("IMAGE",), model: str = "ldm") -> PendingResponse:
        """Send a request without waiting for its response."""
        pending = PendingResponse()
        pending.call = self.client.async_infer(
            model,
            tensors(self._api, wish),
            lambda result, error: pending.answers.put((result, error)),
            outputs=requested_outputs(self._api, outputs),
        )
        return pending

    def stream(self, wish: dict[str, Any], outputs: tuple[str, ...]) -> Iterator[Any]:
        """Yield the responses of `ldm_stream` as they arrive; closing the iterator early cancels the request."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: answers.put((result, error)))
        whole = False
        try:
            self.client.async_stream_infer(
                "ldm_stream",
                tensors(self._api, wish),
                outputs=requested_outputs(self._api, outputs),
                enable_empty_final_response=True,
            )
            while not whole:
                result, error = answers.get(timeout=WAIT)
                if error is not None:
                    raise error
                whole = result.get_response().parameters["triton_final_response"].bool_param
                if result.get_response().outputs:
                    yield result
        finally:
            self.client.stop_stream(cancel_requests=not whole)


class PendingResponse:
    """A request that has been sent."""

    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call: Any = None

    def result(self) -> Any:
        """Wait for the response; raises the server's error."""
        result, error = self.answers.get(timeout=WAIT)
        if error is not None:
            raise error
        return result


def post(url: str, path: str, document: Any) -> tuple[int, Any]:
    """Send plain HTTP; returns the status and the parsed JSON."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    request = urllib.request.Request(f"http://{url}{path}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            text, status = answer.read(), answer.status
    except urllib.error.HTTPError as error:
        text, status = error.read(), error.code
    return status, json.loads(text) if text else None
