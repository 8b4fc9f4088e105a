"""ONNX Runtime as a device of the denoising loop: tensors stay in its memory, bound to the graphs that share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends.onnxruntime import first_line, load_onnxruntime, open_session
from ldm_runtime.device_loop import Tensor
from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec, sizes_of


class OnnxRuntimeDevice:
    """Runs graphs on shared tensors through IO binding.

    Sessions are made for one set of shapes, and anew when other shapes come: with fixed shapes all of a graph runs on
    the GPU, and each call is one CUDA graph.

    Args:
        graphs: component → (ONNX file, spec); loaded when first held.
        device: "cuda", or "cpu", where it serves tests.
    """

    def __init__(self, graphs: Mapping[str, tuple[Path, ComponentSpec]], device: str = "cuda"):
        self._graphs, self._device = graphs, device
        self._held: Any = None
        self._values: dict[str, Any] = {}
        self._calls: dict[str, tuple[Any, Any]] = {}

    def hold(self, tensors: Mapping[str, Tensor], components: Sequence[str]) -> None:
        """Have memory for these tensors and sessions of their shapes; what is held already stays.

        Raises:
            SpecError: shapes a component does not take.
            BackendError: a graph cannot be loaded, or there is no memory.
        """
        key = (tuple(sorted(tensors.items())), tuple(components))
        if key == self._held:
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
        except Exception as error:  # onnxruntime raises bare classes of its C++ side
            raise BackendError(f"onnxruntime: {first_line(error)}; free GPU memory") from None
        for component, (_, binding) in self._calls.items():
            spec = self._graphs[component][1]
            for tensor in spec.inputs:
                binding.bind_ortvalue_input(tensor.name, self._values[tensor.name])
            for tensor in spec.outputs:
                binding.bind_ortvalue_output(tensor.name, self._values[tensor.name])
        self._held = key

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Copy from the host."""
        self._values[name].update_inplace(np.ascontiguousarray(array))

    def read(self, name: str) -> NDArray[Any]:
        """Copy to the host."""
        return np.array(self._values[name].numpy())

    def copy(self, source: str, target: str) -> None:
        """Copy on the device."""
        self._values[target].update_inplace(self._values[source])

    def launch(self, component: str) -> None:
        """Run a component on what its tensors hold.

        Raises:
            BackendError: onnxruntime failed, e.g. out of memory.
        """
        session, binding = self._calls[component]
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # as above
            raise BackendError(f"{component}: onnxruntime failed: {first_line(error)}") from None

    def close(self) -> None:
        """Free tensors and sessions."""
        self._calls.clear()
        self._values.clear()
        self._held = None
