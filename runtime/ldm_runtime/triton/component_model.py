"""The models `text_encoder`, `unet` and `decoder`: one component of a bundle each, without the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import LdmError
from ldm_runtime.specs import TensorSpec
from ldm_runtime.triton.parameters import Settings, version_folder

Feed = dict[str, NDArray[Any]]


class ComponentModel:
    """As Triton's python backend calls it; ``pb`` is triton_python_backend_utils."""

    pb: Any

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the component.

        Raises:
            TritonModelException: in one line, why it does not load.
        """
        settings = Settings.of(args)
        try:
            self._pipeline = settings.open(version_folder(args))
            self._backend = self._pipeline.backends[settings.component]
        except LdmError as error:
            raise self.pb.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests that Triton has put together: those of one shape run in one call."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        feeds = [self._feed(request) for request in requests]
        for index, feed in enumerate(feeds):
            groups.setdefault(tuple(array.shape[1:] for array in feed.values()), []).append(index)
        answers: dict[int, Any] = {}
        for indices in groups.values():
            answers |= dict(zip(indices, self._run([feeds[index] for index in indices]), strict=True))
        return [answers[index] for index in range(len(requests))]

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
            text = str(error) if isinstance(error, LdmError) else f"server: {type(error).__name__}: {error}"
            answer = self.pb.InferenceResponse(error=self.pb.TritonError(" ".join(text.split())))
            return [answer] * len(feeds)
        ends = np.cumsum([len(next(iter(feed.values()))) for feed in feeds])
        parts = {tensor.name: np.split(results[tensor.name], ends[:-1]) for tensor in self._outputs}
        return [
            self.pb.InferenceResponse(
                [self.pb.Tensor(name, np.ascontiguousarray(part[i])) for name, part in parts.items()]
            )
            for i in range(len(feeds))
        ]

    @property
    def _outputs(self) -> tuple[TensorSpec, ...]:
        return self._backend.outputs

    def finalize(self) -> None:
        """Free it."""
        self._pipeline.close()
