"""A connection to a Triton server over HTTP or gRPC; every failure is a ``ServerError`` of one line.

The protocol is KServe's open inference protocol 2 with Triton's extensions, as tritonclient implements it.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_export.extras import needs
from ldm_export.serving.address import Address
from ldm_export.serving.server_errors import one_line_errors
from ldm_runtime.errors import ServerError, SpecError
from ldm_runtime.number_checks import seconds, shown

__all__ = ["Arrays", "Connection"]

MAX_TIMEOUT = 1e6
GRACE = 10.0
"""Seconds to wait beyond the timeout, so that the server's own error message arrives."""
Arrays = dict[str, NDArray[Any]]


class Connection:
    """A connection to one model of a server; close it, or use it in a ``with`` statement.

    Args:
        address: Address of the server.
        model: Name of the model.
        timeout: Seconds that a request may take.

    Attributes:
        inputs: Name -> data type of each input of the model.
        outputs: Names of its outputs.

    Raises:
        SpecError: ``timeout`` is not a number of seconds above 0.
        ServerError: The server cannot be reached, or the model is not ready.
        LdmError: tritonclient is not installed.
    """

    def __init__(self, address: Address, model: str, timeout: float):
        timeout = seconds("timeout", timeout)
        if timeout > MAX_TIMEOUT:
            raise SpecError(f"timeout: got {shown(timeout)}, expected at most {MAX_TIMEOUT:g} seconds")
        self.address, self.model, self.timeout = address, model, timeout
        with needs("client"):
            if address.protocol == "http":
                import tritonclient.http as api

                from ldm_export.serving.http_client import HttpClient
            else:
                import tritonclient.grpc as api
        self._api, self._http = api, address.protocol == "http"
        with one_line_errors(self.address, self.timeout):
            self._check_port()
            self._client: Any = (
                HttpClient(address, timeout + GRACE)
                if self._http
                else api.InferenceServerClient(address.target, ssl=address.secure)
            )
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def _check_port(self) -> None:
        """Raise an error immediately if no server listens, because gRPC itself would retry."""
        socket.create_connection((self.address.host, self.address.port), timeout=10).close()

    def _describe(self) -> None:
        limit = {} if self._http else {"client_timeout": 30}
        with one_line_errors(self.address, self.timeout):
            if not self._client.is_server_live(**limit):
                raise ServerError(f"{self.address}: the server is not live; look into its log")
            if not self._client.is_model_ready(self.model, **limit):
                raise ServerError(self._unready(limit))
            facts = self._client.get_model_metadata(self.model, **({} if self._http else {"as_json": True, **limit}))
            self.inputs = {str(tensor["name"]): str(tensor["datatype"]) for tensor in facts.get("inputs", [])}
            self.outputs = [str(tensor["name"]) for tensor in facts.get("outputs", [])]

    def _unready(self, limit: dict[str, Any]) -> str:
        """Return the error for a model that is not ready: unknown, failed, loading, or unable to generate images."""
        index = self._client.get_model_repository_index(**({} if self._http else {"as_json": True, **limit}))
        models = index if isinstance(index, list) else index.get("models", [])
        known = {model["name"]: model for model in models}
        if self.model not in known:
            names = ", ".join(sorted(known)) or "none"
            return f"{self.address}: has no model {self.model!r}, but {names}; choose another --model"
        state, reason = (known[self.model].get(key) or "" for key in ("state", "reason"))
        detail = f" ({state.lower()}{': ' if state and reason else ''}{reason})" if state or reason else ""
        return f"{self.address}: model {self.model!r} is not ready{detail}; wait for it, or look into the server's log"

    def infer(self, inputs: Mapping[str, Any], outputs: list[str], **options: Any) -> Arrays:
        """Send a request and wait for its single response.

        Args:
            inputs: Name -> number, text, or list of them; converted to the data types of the model.
            outputs: Names of the outputs to return.
            options: Passed to tritonclient.

        Raises:
            ServerError: The server responded with an error, or not in time.
            SpecError: A value does not fit the data type.
        """
        sent = self._inputs(inputs)
        with one_line_errors(self.address, self.timeout):
            requested = [self._api.InferRequestedOutput(name) for name in outputs]
            if self._http:
                result = self._client.infer(self.model, sent, outputs=requested, **options)
                return _arrays(result, outputs)
            answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
            call = self._client.async_infer(
                self.model,
                sent,
                lambda result, error: answers.put((result, error)),
                outputs=requested,
                client_timeout=self.timeout + GRACE,
                **options,
            )
            try:
                result, error = _get(answers, self.timeout + 2 * GRACE)
            except BaseException:
                call.cancel()
                raise
            if error is not None:
                raise error
            return _arrays(result, outputs)

    def stream(self, inputs: Mapping[str, Any], outputs: list[str], **options: Any) -> Generator[Arrays, None, None]:
        """Yield the responses of a decoupled model as they arrive, each with some of ``outputs``; gRPC only.

        Closing the iterator early cancels the request.

        Raises:
            ServerError, SpecError: As ``infer``; or the connection is HTTP.
        """
        if self._http:
            raise SpecError(f"{self.address}: a stream needs gRPC; use --protocol grpc and its port, usually 8001")
        sent = self._inputs(inputs)
        requested = [self._api.InferRequestedOutput(name) for name in outputs]
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        until, complete = time.monotonic() + self.timeout + GRACE, False
        self._client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            with one_line_errors(self.address, self.timeout):
                self._client.async_stream_infer(
                    self.model, sent, outputs=requested, enable_empty_final_response=True, **options
                )
            while not complete:
                with one_line_errors(self.address, self.timeout):
                    result, error = _get(answers, until - time.monotonic())
                    if error is not None:
                        raise error
                    response = result.get_response()
                    final = response.parameters.get("triton_final_response")
                    complete = final is not None and final.bool_param
                    present = [tensor.name for tensor in response.outputs]
                    arrays = _arrays(result, [name for name in outputs if name in present]) if present else None
                if arrays is not None:
                    yield arrays
        finally:
            self._client.stop_stream(cancel_requests=not complete)

    def _inputs(self, values: Mapping[str, Any]) -> list[Any]:
        from tritonclient.utils import triton_to_np_dtype

        tensors = []
        for name, value in values.items():
            if name not in self.inputs:
                known = ", ".join(self.inputs)
                raise ServerError(
                    f"{self.address}: model {self.model!r} has no input {name}, only {known}; choose another"
                )
            kind, listed = self.inputs[name], value if isinstance(value, list | np.ndarray) else [value]
            if kind != "BYTES" and triton_to_np_dtype(kind) is None:
                raise ServerError(f"{self.address}: input {name} has the unknown data type {kind!r:.40}; check --model")
            try:
                if kind == "BYTES":
                    array = np.array([text.encode() for text in listed], dtype=object)
                else:
                    array = np.array(listed, dtype=triton_to_np_dtype(kind))
            except (OverflowError, UnicodeEncodeError) as error:
                raise SpecError(
                    f"{name}: {error}, the server takes {'UTF-8 text' if kind == 'BYTES' else kind}"
                ) from None
            tensor = self._api.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        return tensors

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _arrays(result: Any, names: list[str]) -> Arrays:
    arrays = {name: result.as_numpy(name) for name in names}
    missing = [name for name, array in arrays.items() if array is None]
    if missing:
        raise ServerError(f"the answer has no {', '.join(missing)}; is it a model that `ldm-export triton` wrote?")
    return arrays


def _get(answers: queue.SimpleQueue[tuple[Any, Any]], seconds: float) -> tuple[Any, Any]:
    """The next answer. Waits in short intervals, so that Ctrl-C is handled."""
    until = time.monotonic() + seconds
    while True:
        try:
            return answers.get(timeout=min(0.5, max(0.0, until - time.monotonic())))
        except queue.Empty:
            if time.monotonic() >= until:
                raise
