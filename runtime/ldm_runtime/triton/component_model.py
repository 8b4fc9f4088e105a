"""A Triton model that runs one component of a bundle, e.g. `text_encoder` or `unet`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import LdmError
from ldm_runtime.triton.open_requests import triton_error
from ldm_runtime.triton.parameters import ModelParameters, bundle_folder

__all__ = ["ComponentModel"]

Feed = dict[str, NDArray[Any]]


class ComponentModel:
    """A model of Triton's Python backend; ``pb`` is triton_python_backend_utils."""

    pb: Any

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the component.

        Raises:
            TritonModelException: The component cannot be loaded; one line.
        """
        try:
            self._backend = ModelParameters.from_args(args).open_component(Bundle.open(bundle_folder(args)))
        except LdmError as error:
            raise self.pb.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests of a batch; requests with equal shapes run in one call."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        feeds = [self._feed(request) for request in requests]
        for index, feed in enumerate(feeds):
            groups.setdefault(tuple(array.shape[1:] for array in feed.values()), []).append(index)
        responses: dict[int, Any] = {}
        for indices in groups.values():
            responses |= dict(zip(indices, self._run([feeds[index] for index in indices]), strict=True))
        return [responses[index] for index in range(len(requests))]

    def _feed(self, request: Any) -> Feed:
        feed = {}
        for tensor in self._backend.inputs:
            array = self.pb.get_input_tensor_by_name(request, tensor.name).as_numpy()
            feed[tensor.name] = array.reshape(-1) if len(tensor.shape) == 1 else array
        return feed

    def _run(self, feeds: list[Feed]) -> list[Any]:
        joined = {tensor.name: np.concatenate([feed[tensor.name] for feed in feeds]) for tensor in self._backend.inputs}
        try:
            results = self._backend.run(joined)
        except Exception as error:
            response = self.pb.InferenceResponse(error=triton_error(error, self.pb))
            return [response] * len(feeds)
        ends = np.cumsum([len(next(iter(feed.values()))) for feed in feeds])
        parts = {tensor.name: np.split(results[tensor.name], ends[:-1]) for tensor in self._backend.outputs}
        return [
            self.pb.InferenceResponse(
                [self.pb.Tensor(name, np.ascontiguousarray(part[i])) for name, part in parts.items()]
            )
            for i in range(len(feeds))
        ]

    def finalize(self) -> None:
        """Free the component."""
        self._backend.close()
