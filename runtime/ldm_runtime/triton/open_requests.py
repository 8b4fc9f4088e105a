"""Requests that Triton has given us and that wait for their last answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ldm_runtime.errors import LdmError
from ldm_runtime.triton.tensors import Tensors

WATCH, LOOK = 0.02, 0.004
"""Seconds from one look at whether callers still want their answers to the next, and at least so many per caller: each
look is a message to the server and back, and takes its time from the cores that the UNet runs on."""
_log = logging.getLogger(__name__)


class OpenRequest:
    """One of them: answers go to its sender, the last one once and only once.

    Args:
        request: Triton's.
        pb: triton_python_backend_utils.
    """

    def __init__(self, request: Any, pb: Any):
        self._pb, self._sender, self._lock = pb, request.get_response_sender(), threading.Lock()
        self.inputs = {tensor.name(): np.array(tensor.as_numpy()) for tensor in request.inputs()}  # copies: Triton's go
        self.wanted = set(request.requested_output_names())
        self.parameters: str = request.parameters()
        self.cancel: Callable[[], object] | None = None
        """What stops the work on it."""
        self.over = False

    def send(self, tensors: Tensors, last: bool) -> None:
        """Send an answer; nothing after the last one."""
        self._send(self._pb.InferenceResponse([self._pb.Tensor(name, array) for name, array in tensors.items()]), last)

    def fail(self, error: BaseException) -> None:
        """Send an error as the last answer, told in one line."""
        text = str(error) if isinstance(error, LdmError) else f"server: {type(error).__name__}: {error}"
        self._send(self._pb.InferenceResponse(error=self._pb.TritonError(" ".join(text.split()))), True)

    def _send(self, response: Any, last: bool) -> None:
        flags = {"flags": self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL} if last else {}
        with self._lock:
            if self.over:
                return
            self.over = last
            try:
                self._sender.send(response, **flags)
            except Exception:  # the caller is gone
                _log.exception("an answer could not be sent")

    def gone(self) -> bool:
        """True where the caller has cancelled it; a sender that has sent its last answer must not be asked."""
        with self._lock:
            return not self.over and bool(self._sender.is_cancelled())


class OpenRequests:
    """All of them, and a thread that cancels those whose callers have gone."""

    def __init__(self) -> None:
        self._open: set[OpenRequest] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._watch, name="ldm-callers", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._open)

    def add(self, request: OpenRequest) -> None:
        """Watch a request until it is over."""
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
                self._open = {request for request in self._open if not request.over}
                watched = list(self._open)
            for request in watched:
                if request.cancel is not None and not request.over and request.gone():
                    request.cancel()
                    request.cancel = None
            with self._changed:
                self._changed.wait_for(lambda: self._closing, max(WATCH, LOOK * len(watched)))

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
