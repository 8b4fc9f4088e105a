"""Runs the UNet as another Triton model that is called at each step, so that several models can share one UNet."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec

__all__ = ["PerStepUNet"]


class PerStepUNet(SpecBackend):
    """A backend that calls the model `unet` or `shallow_unet` of this server (Triton's Business Logic Scripting).

    Args:
        pb: triton_python_backend_utils.
        spec: Spec of the UNet; the model has its name.
    """

    def __init__(self, pb: Any, spec: ComponentSpec):
        self._pb, self._spec = pb, spec

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Call the model once, with all inputs of the UNet.

        Raises:
            BackendError: The model is not loaded, or has failed.
        """
        columns = {name: array.reshape(-1, 1) if array.ndim == 1 else array for name, array in feed.items()}
        request = self._pb.InferenceRequest(
            model_name=self._spec.name,
            inputs=[self._pb.Tensor(name, np.ascontiguousarray(array)) for name, array in columns.items()],
            requested_output_names=[tensor.name for tensor in self.outputs],
        )
        response = request.exec()
        if response.has_error():
            raise BackendError(f"{self._spec.name}: {response.error().message()}")
        return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def close(self) -> None:
        """Nothing to free."""
