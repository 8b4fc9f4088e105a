"""The model `ldm`: one request, one answer, over plain HTTP too; `ldm_stream` does the work, for both in one batch."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from ldm_runtime.errors import LdmError, QueueFullError
from ldm_runtime.triton.open_requests import OpenRequest, OpenRequests
from ldm_runtime.triton.parameters import Settings
from ldm_runtime.triton.response_files import ResponseFiles
from ldm_runtime.triton.tensors import CANCEL, ID, Tensors, parameters

MODEL = "ldm_stream"
SPARE = 16
"""Requests passed on beyond those that can wait and run there: they are refused there, with its own words."""


class AnsweredError(LdmError):
    """What `ldm_stream` answered, in its words."""


class UnaryModel:
    """As Triton's python backend calls it; ``pb`` is triton_python_backend_utils.

    A model that answers in many parts ("decoupled") cannot be asked over plain HTTP; so this one waits for the last.
    """

    pb: Any

    def initialize(self, args: Mapping[str, str]) -> None:
        """Make ready to pass requests on."""
        limits = Settings.of(args).limits
        self._most = limits.queue + limits.rows * limits.heights_and_widths + SPARE
        self._threads = ThreadPoolExecutor(self._most, "ldm-front")
        self._cancels = ThreadPoolExecutor(4, "ldm-cancel")
        self._open, self._parcels = OpenRequests(), ResponseFiles()
        self._passed = threading.Semaphore(self._most)

    def execute(self, requests: list[Any]) -> None:
        """Pass requests on; returns at once, the answers follow."""
        for each in requests:
            request = OpenRequest(each, self.pb)
            if not self._passed.acquire(blocking=False):
                request.fail(QueueFullError(f"queue: {self._most} requests wait already; ask again later"))
                continue
            name = str(uuid.uuid4())
            request.cancel = partial(self._cancels.submit, self._cancel, name)
            self._threads.submit(self._pass, request, name)
            self._open.add(request)

    def _pass(self, request: OpenRequest, name: str) -> None:
        try:
            options = {**parameters(request.parameters), ID: name}
            options.pop(CANCEL, None)
            self._parcels.open(name)
            found = self._ask(request.inputs, options, request.wanted)
            request.send(self._parcels.take(name) or found, last=True)
        except Exception as error:
            request.fail(error)
        finally:
            self._parcels.drop(name)
            self._passed.release()

    def _cancel(self, name: str) -> None:
        self._ask({"PROMPT": np.array([b""], object)}, {CANCEL: name}, {"SEED_USED"})

    def _ask(self, inputs: Tensors, options: dict[str, Any], wanted: set[str]) -> Tensors:
        request = self.pb.InferenceRequest(
            model_name=MODEL,
            inputs=[self.pb.Tensor(name, array) for name, array in inputs.items()],
            requested_output_names=sorted(wanted),
            parameters=options,
        )
        found: Tensors = {}
        for response in request.exec(decoupled=True):
            if response.has_error():
                raise AnsweredError(response.error().message())
            found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()} or found
        return found

    def finalize(self) -> None:
        """Wait for the last answers; Triton unloads a model only when there are none to come."""
        self._threads.shutdown()
        self._cancels.shutdown()
        self._open.close()
        self._parcels.close()
