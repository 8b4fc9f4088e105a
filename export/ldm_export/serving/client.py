"""Asking a Triton server for pictures over HTTP or gRPC, with every failure told in one line.

The protocol is KServe's open inference protocol 2 with Triton's extensions; tritonclient speaks it.
"""

from __future__ import annotations

import queue
import socket
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_export.extras import needs
from ldm_export.serving.address import Address
from ldm_runtime.errors import LdmError, SpecError

GRACE = 10.0
"""Seconds that an answer may be later than the deadline, so that the server's own word for it arrives."""
Arrays = dict[str, NDArray[Any]]


class ServerError(LdmError):
    """A server cannot be reached, is not ready, or did not give what it was asked for."""


class Connection:
    """A connection to one model of a server; close it, or use it in a ``with``.

    Args:
        address: of the server.
        model: its name.
        seconds: a request may take.

    Raises:
        LdmError: tritonclient is not installed, or the server cannot be reached or has no such model ready.
    """

    def __init__(self, address: Address, model: str, seconds: float):
        if not 0 < seconds < 1e6:
            raise SpecError(f"timeout: got {seconds:g}, expected a number of seconds above 0")
        self.address, self.model, self.seconds = address, model, seconds
        with needs("client"):
            if address.protocol == "http":
                import tritonclient.http as api
            else:
                import tritonclient.grpc as api
        self._api, self._http = api, address.protocol == "http"
        late = {"connection_timeout": 10.0, "network_timeout": seconds + GRACE} if self._http else {}
        with self._told():
            self._check_port()
            self._client = api.InferenceServerClient(address.target, ssl=address.secure, **late)
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def _check_port(self) -> None:
        """Fail at once where nobody listens: gRPC itself would try again and again."""
        socket.create_connection((self.address.host, self.address.port), timeout=10).close()

    def _describe(self) -> None:
        limit = {} if self._http else {"client_timeout": 30}
        with self._told():
            if not self._client.is_server_live(**limit):
                raise ServerError(f"{self.address}: the server is not live; look into its log")
            if not self._client.is_model_ready(self.model, **limit):
                raise ServerError(self._unready(limit))
            facts = self._client.get_model_metadata(self.model, **({} if self._http else {"as_json": True, **limit}))
        self.inputs: dict[str, str] = {tensor["name"]: tensor["datatype"] for tensor in facts.get("inputs", [])}
        self.outputs: list[str] = [tensor["name"] for tensor in facts.get("outputs", [])]

    def _unready(self, limit: dict[str, Any]) -> str:
        """Why the model is not: unknown, failed, loading, or loaded but unable to make a picture."""
        index = self._client.get_model_repository_index(**({} if self._http else {"as_json": True, **limit}))
        models = index if isinstance(index, list) else index.get("models", [])
        known = {model["name"]: model for model in models}
        if self.model not in known:
            names = ", ".join(sorted(known)) or "none"
            return f"{self.address}: has no model {self.model!r}, but {names}; choose another --model"
        state, reason = (known[self.model].get(key) or "" for key in ("state", "reason"))
        told = f" ({state.lower()}{': ' if state and reason else ''}{reason})" if state or reason else ""
        return f"{self.address}: model {self.model!r} is not ready{told}; wait for it, or look into the server's log"

    def infer(self, inputs: Mapping[str, Any], outputs: list[str], **options: Any) -> Arrays:
        """One answer: the named outputs. ``inputs`` are lists or numbers, sent with the dtypes the model tells.

        Raises:
            ServerError: why there is none.
        """
        sent = self._inputs(inputs)
        with self._told():
            asked = [self._api.InferRequestedOutput(name) for name in outputs]
            if self._http:
                result = self._client.infer(self.model, sent, outputs=asked, **options)
                return _arrays(result, outputs)
            answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
            call = self._client.async_infer(
                self.model,
                sent,
                lambda result, error: answers.put((result, error)),
                outputs=asked,
                client_timeout=self.seconds + GRACE,
                **options,
            )
            try:
                result, error = _get(answers, self.seconds + 2 * GRACE)
            except BaseException:
                call.cancel()
                raise
            if error is not None:
                raise error
            return _arrays(result, outputs)

    def stream(self, inputs: Mapping[str, Any], outputs: list[str], **options: Any) -> Generator[Arrays, None, None]:
        """The answers of a decoupled model as they come, those of ``outputs`` that each has; gRPC only.

        An iterator that is closed early cancels the request.

        Raises:
            ServerError: why there are no more.
        """
        if self._http:
            raise SpecError(f"{self.address}: a stream needs gRPC; use --protocol grpc and its port, usually 8001")
        sent = self._inputs(inputs)
        asked = [self._api.InferRequestedOutput(name) for name in outputs]
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        until, whole = time.monotonic() + self.seconds + GRACE, False
        self._client.start_stream(lambda result, error: answers.put((result, error)))
        try:
            with self._told():
                self._client.async_stream_infer(
                    self.model, sent, outputs=asked, enable_empty_final_response=True, **options
                )
            while not whole:
                with self._told():
                    result, error = _get(answers, until - time.monotonic())
                    if error is not None:
                        raise error
                    response = result.get_response()
                    final = response.parameters.get("triton_final_response")
                    whole = final is not None and final.bool_param
                    present = [tensor.name for tensor in response.outputs]
                if present:
                    yield _arrays(result, [name for name in outputs if name in present])
        finally:
            self._client.stop_stream(cancel_requests=not whole)

    def _inputs(self, values: Mapping[str, Any]) -> list[Any]:
        from tritonclient.utils import triton_to_np_dtype

        made = []
        for name, value in values.items():
            if name not in self.inputs:
                known = ", ".join(self.inputs)
                raise ServerError(f"{self.address}: model {self.model!r} takes no {name}, but {known}; choose another")
            kind, listed = self.inputs[name], value if isinstance(value, list) else [value]
            try:
                if kind == "BYTES":
                    array = np.array([text.encode() for text in listed], dtype=object)
                else:
                    array = np.array(listed, dtype=triton_to_np_dtype(kind))
            except (OverflowError, UnicodeEncodeError) as error:
                raise SpecError(f"{name}: {error}, the server takes {UTF8 if kind == 'BYTES' else kind}") from None
            tensor = self._api.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            made.append(tensor)
        return made

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what tritonclient and its transports raise into one line."""
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except InferenceServerException as error:
            raise self._error(error.status() or "", error.message() or str(error)) from None
        except (ConnectionError, socket.gaierror) as error:
            raise ServerError(f"{self.address}: cannot be reached ({error.strerror or error}); {START}") from None
        except (TimeoutError, queue.Empty):
            raise ServerError(f"{self.address}: no answer in {self.seconds:g} s; {LONGER}") from None
        except LdmError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            cause = " ".join(str(error).split()) or type(error).__name__
            other = "grpc" if self._http else "http"
            raise ServerError(f"{self.address}: no Triton answers there ({cause}); is the port for {other}?") from None

    def _error(self, status: str, message: str) -> ServerError:
        text, where = " ".join(message.split()), f"{self.address}"
        if any(mark in text for mark in REJECTED):
            return ServerError(f"{where}: rejected, too many requests wait ({text}); ask again later")
        if "DEADLINE_EXCEEDED" in status or any(mark in text.lower() for mark in OVERDUE):
            return ServerError(f"{where}: not done in {self.seconds:g} s ({text}); {LONGER}")
        if "UNAVAILABLE" in status:
            return ServerError(f"{where}: cannot be reached ({text}); {START}")
        return ServerError(f"{where}: {text}")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


START = "start the server, or check --url and --protocol"
UTF8 = "UTF-8 text"
LONGER = "give it a longer --timeout, or ask for fewer steps or pictures"
REJECTED = ("requests wait already", "Exceeds maximum queue size", "ask again later")
OVERDUE = ("deadline", "timed out", "timeout expired", "still waiting after its", "still running after its")


def _arrays(result: Any, names: list[str]) -> Arrays:
    found = {name: result.as_numpy(name) for name in names}
    missing = [name for name, array in found.items() if array is None]
    if missing:
        raise ServerError(f"the answer has no {', '.join(missing)}; is it a model that `ldm-export triton` wrote?")
    return found


def _get(answers: queue.SimpleQueue[tuple[Any, Any]], seconds: float) -> tuple[Any, Any]:
    """The next answer; waits in short turns, so that an interrupt is heard."""
    until = time.monotonic() + seconds
    while True:
        try:
            return answers.get(timeout=min(0.5, max(0.0, until - time.monotonic())))
        except queue.Empty:
            if time.monotonic() >= until:
                raise
