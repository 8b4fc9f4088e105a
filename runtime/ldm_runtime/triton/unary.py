"""The model `ldm`: one response per request, also over plain HTTP; `ldm_stream` does the work for both."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ldm_runtime.errors import AnsweredError, LdmError, QueueFullError
from ldm_runtime.triton.open_requests import OpenRequest, OpenRequests
from ldm_runtime.triton.parameters import ModelParameters
from ldm_runtime.triton.request_tensors import parse_parameters
from ldm_runtime.triton.response_files import ResponseFiles
from ldm_runtime.triton.tensors import CANCEL, CHECK, ID, Tensors

__all__ = ["UnaryModel"]

MODEL = "ldm_stream"
SPARE = 16
"""Number of requests forwarded beyond those that `ldm_stream` accepts, so that it refuses them with its own message."""
CANCEL_SECONDS = 0.05
"""Seconds between two attempts to cancel a request."""


class UnaryModel:
    """A model of Triton's Python backend; ``pb`` is triton_python_backend_utils.

    Plain HTTP cannot call a decoupled model, which sends several responses. This model waits for the last response.
    """

    pb: Any

    def initialize(self, args: Mapping[str, str]) -> None:
        """Start the threads that forward requests.

        Raises:
            TritonModelException: A parameter of the config cannot be used; one line.
        """
        try:
            limits = ModelParameters.from_args(args).limits
        except LdmError as error:
            raise self.pb.TritonModelException(str(error)) from None
        self._max_forwarded = limits.max_queue + limits.max_rows * limits.max_sizes + SPARE
        self._forwarding = ThreadPoolExecutor(self._max_forwarded, "ldm-forward")
        self._cancelling = ThreadPoolExecutor(4, "ldm-cancel")
        self._open, self._files = OpenRequests(), ResponseFiles()
        self._free = threading.Semaphore(self._max_forwarded)

    def execute(self, requests: list[Any]) -> None:
        """Forward requests; returns at once, the responses follow."""
        for each in requests:
            request = OpenRequest(each, self.pb)
            if not self._free.acquire(blocking=False):
                waiting = f"{self._max_forwarded} requests are waiting already"
                request.fail(QueueFullError(f"queue: full, {waiting}; try again later"))
                continue
            name = str(uuid.uuid4())
            request.cancel = partial(self._cancelling.submit, self._cancel, request, name)
            self._forwarding.submit(self._forward, request, name)
            self._open.add(request)

    def _forward(self, request: OpenRequest, name: str) -> None:
        try:
            options: dict[str, Any] = {ID: name}
            if CHECK in parse_parameters(request.parameters):  # other parameters of the caller have no meaning
                options[CHECK] = True
            self._files.create(name)
            outputs = self._call(request.inputs, options, request.requested)
            request.send(self._files.read(name) or outputs, last=True)
        except Exception as error:
            request.fail(error)
        finally:
            self._files.remove(name)
            self._free.release()

    def _cancel(self, request: OpenRequest, name: str) -> None:
        """Cancel a forwarded request, which may not have arrived yet: try until it has arrived or is finished."""
        while not request.finished:
            try:
                self._call(request.inputs, {CANCEL: name}, {"SEED_USED"})
                return
            except AnsweredError:
                time.sleep(CANCEL_SECONDS)

    def _call(self, inputs: Tensors, options: dict[str, Any], requested: set[str]) -> Tensors:
        request = self.pb.InferenceRequest(
            model_name=MODEL,
            inputs=[self.pb.Tensor(name, array) for name, array in inputs.items()],
            requested_output_names=sorted(requested),
            parameters=options,
        )
        outputs: Tensors = {}
        for response in request.exec(decoupled=True):
            if response.has_error():
                raise AnsweredError(response.error().message(), response.error().code())
            outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()} or outputs
        return outputs

    def finalize(self) -> None:
        """Wait for the last responses; Triton unloads a model only when it has no requests."""
        self._forwarding.shutdown()
        self._cancelling.shutdown()
        self._open.close()
        self._files.close()
