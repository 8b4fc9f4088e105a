"""Triton requests that have not got their last response, and a watch for callers that disconnect."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ldm_runtime.errors import AnsweredError, CancelledError, DeadlineError, LdmError, QueueFullError, SpecError
from ldm_runtime.triton.tensors import Tensors

__all__ = ["OpenRequest", "OpenRequests", "error_text", "triton_error"]

POLL_SECONDS, POLL_SECONDS_PER_REQUEST = 0.02, 0.004
"""Minimum seconds between two rounds of checks for disconnected callers, and minimum seconds per checked request. Each
check is a round trip to the server and takes CPU time from the UNet."""
_log = logging.getLogger(__name__)


def error_text(error: BaseException) -> str:
    """Return an error as one line for a caller; an unexpected error includes its type."""
    text = str(error) if isinstance(error, LdmError) else f"server: {type(error).__name__}: {error}"
    return " ".join(text.split())


def triton_error(error: BaseException, pb: Any) -> Any:
    """Convert an error to Triton's, with the code that decides the caller's status over HTTP and gRPC.

    Invalid input is 400 or INVALID_ARGUMENT. A full queue or an expired TIMEOUT is 503 or UNAVAILABLE, because Triton's
    backends have no code for a deadline. A cancelled request is 499 or CANCELLED. All other errors are 500 or INTERNAL.

    Args:
        error: The exception.
        pb: triton_python_backend_utils.
    """
    codes = pb.TritonError
    if isinstance(error, AnsweredError):
        code = error.code
    elif isinstance(error, SpecError):
        code = codes.INVALID_ARG
    elif isinstance(error, QueueFullError | DeadlineError):
        code = codes.UNAVAILABLE
    else:
        code = codes.CANCELLED if isinstance(error, CancelledError) else codes.INTERNAL
    return codes(error_text(error), code)


class OpenRequest:
    """One request. Responses go to its sender; the last one is sent exactly once.

    Args:
        request: Triton's request.
        pb: triton_python_backend_utils.

    Attributes:
        inputs: The request's tensors, copied because Triton frees its own.
        requested: Names of the requested outputs.
        parameters: Request parameters, a JSON object as text.
        cancel: Stops the work on the request.
        finished: True after the last response.
    """

    def __init__(self, request: Any, pb: Any):
        self._pb, self._sender, self._lock = pb, request.get_response_sender(), threading.Lock()
        self.inputs: Tensors = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}
        self.requested = set(request.requested_output_names())
        self.parameters: str = request.parameters()
        self.cancel: Callable[[], object] | None = None
        self.finished = False

    def send(self, tensors: Tensors, last: bool) -> None:
        """Send a response. After the last response, nothing is sent."""
        self._send(self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in tensors.items()]), last)

    def fail(self, error: BaseException) -> None:
        """Send an error, in one line, as the last response."""
        self._send(self._pb.InferenceResponse(error=triton_error(error, self._pb)), True)

    def _send(self, response: Any, last: bool) -> None:
        flags = {"flags": self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL} if last else {}
        with self._lock:
            if self.finished:
                return
            self.finished = last
            try:
                self._sender.send(response, **flags)
            except Exception:  # the caller has disconnected
                _log.exception("a response could not be sent")

    def disconnected(self) -> bool:
        """True if the caller has cancelled the request. Triton must not be asked after the last response."""
        with self._lock:
            return not self.finished and bool(self._sender.is_cancelled())


class OpenRequests:
    """All open requests, and a thread that cancels those whose callers have disconnected."""

    def __init__(self) -> None:
        self._open: set[OpenRequest] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="ldm-open-requests", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, request: OpenRequest) -> None:
        """Watch a request until it is finished."""
        with self._changed:
            self._open.add(request)
            self._changed.notify()

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._open and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                self._open = {request for request in self._open if not request.finished}
                watched = list(self._open)
            for request in watched:
                if request.cancel is not None and not request.finished and request.disconnected():
                    request.cancel()
                    request.cancel = None
            with self._changed:
                pause = max(POLL_SECONDS, POLL_SECONDS_PER_REQUEST * len(watched))
                self._changed.wait_for(lambda: self._closing, pause)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
