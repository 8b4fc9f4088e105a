"""The UNet as another model of the same server: a call at each step, for comparison and for sharing one UNet."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend, Feed, SpecBackend
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec

MODEL = "unet"


class PerStepUNet(SpecBackend):
    """A backend that asks the model `unet` of this server (Triton's business logic scripting).

    Args:
        pb: triton_python_backend_utils.
        stands_for: the component's own backend, which is not loaded.
    """

    def __init__(self, pb: Any, stands_for: Backend):
        self._pb, self._spec = pb, ComponentSpec(MODEL, stands_for.inputs, stands_for.outputs)

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """One call.

        Raises:
            BackendError: the model is not there, or failed.
        """
        columns = {name: array.reshape(-1, 1) if array.ndim == 1 else array for name, array in feed.items()}
        request = self._pb.InferenceRequest(
            model_name=MODEL,
            inputs=[self._pb.Tensor(name, np.ascontiguousarray(array)) for name, array in columns.items()],
            requested_output_names=[tensor.name for tensor in self.outputs],
        )
        response = request.exec()
        if response.has_error():
            raise BackendError(f"{MODEL}: {response.error().message()}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def close(self) -> None:
        """Nothing to free."""
