"""ONNX Runtime as the device of a denoising loop: tensors stay in device memory and are shared between the graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends.host import first_line
from ldm_runtime.backends.onnxruntime_session import load_onnxruntime, open_session
from ldm_runtime.device_loop import Tensor
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec, sizes_of
from ldm_runtime.verified_file import GraphFile

__all__ = ["OnnxRuntimeDevice"]


class OnnxRuntimeDevice:
    """Runs graphs on shared tensors through IO binding.

    Each session is created for one set of shapes, and again if the shapes change. With fixed shapes a whole graph runs
    on the GPU, and each call is one CUDA graph.

    Args:
        graphs: Component -> (checked ONNX file, spec). A graph is loaded when ``hold`` first names it.
        device: "cuda", or "cpu" for tests.
    """

    def __init__(self, graphs: Mapping[str, tuple[GraphFile, ComponentSpec]], device: str = "cuda"):
        self._graphs, self._device = graphs, device
        self._shapes: Any = None
        self._values: dict[str, Any] = {}
        self._calls: dict[str, tuple[Any, Any]] = {}

    def hold(self, tensors: Mapping[str, Tensor], components: Sequence[str]) -> None:
        """Allocate tensors and load the sessions of components for their shapes. The same call again does nothing.

        Args:
            tensors: Tensor name -> (shape, dtype).
            components: Names of the components to load.

        Raises:
            SpecError: A component does not take these shapes.
            BackendError: A graph cannot be loaded, or memory ran out.
        """
        key = (tuple(sorted(tensors.items())), tuple(components))
        if key == self._shapes:
            return
        self.close()
        for component in components:
            graph, spec = self._graphs[component]
            sizes = sizes_of(spec, {tensor.name: tensors[tensor.name][0] for tensor in spec.inputs})
            session, _ = open_session(graph, spec, self._device, sizes=sizes)
            self._calls[component] = session, session.io_binding()
        ort = load_onnxruntime()
        try:
            for name, (shape, dtype) in tensors.items():
                self._values[name] = ort.OrtValue.ortvalue_from_shape_and_type(
                    list(shape), np.dtype(dtype).type, self._device, 0
                )
        except Exception as error:  # onnxruntime raises exceptions of its C++ code, which have no common class
            raise BackendError(f"onnxruntime: {first_line(error)}; free GPU memory") from None
        for component, (_, binding) in self._calls.items():
            spec = self._graphs[component][1]
            for tensor in spec.inputs:
                binding.bind_ortvalue_input(tensor.name, self._values[tensor.name])
            for tensor in spec.outputs:
                binding.bind_ortvalue_output(tensor.name, self._values[tensor.name])
        self._shapes = key

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Copy an array from the host."""
        self._values[name].update_inplace(np.ascontiguousarray(array))

    def read(self, name: str) -> NDArray[Any]:
        """Copy a tensor to the host. The array belongs to the caller."""
        return np.array(self._values[name].numpy())

    def copy(self, source: str, target: str) -> None:
        """Copy a tensor to another one of the same shape on the device."""
        self._values[target].update_inplace(self._values[source])

    def launch(self, component: str) -> None:
        """Run a component on its tensors.

        Raises:
            BackendError: onnxruntime failed, e.g. because memory ran out.
        """
        session, binding = self._calls[component]
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # as in hold
            raise BackendError(f"{component}: onnxruntime failed: {first_line(error)}") from None

    def close(self) -> None:
        """Free the tensors and the sessions."""
        self._calls.clear()
        self._values.clear()
        self._shapes = None
