"""TensorRT as the device of a denoising loop: engines that share device memory and run in the order of one stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends.cuda import Buffer, empty
from ldm_runtime.backends.tensorrt_engine import LoadedEngine
from ldm_runtime.device_loop import Tensor
from ldm_runtime.errors import BackendError
from ldm_runtime.model import UNET

__all__ = ["TensorRtDevice"]


class TensorRtDevice:
    """Runs engines on shared tensors.

    Args:
        unet: The UNet's loaded engine, which this class does not close.
        open_step: Loads the engine of a step graph by its name, at its first use.

    Raises:
        BackendError: The GPU failed.
    """

    def __init__(self, unet: LoadedEngine, open_step: Callable[[str], LoadedEngine]):
        self._open, self._cuda = open_step, unet.cuda
        self._engines = {UNET: unet}
        self._stream = self._cuda.call("cudaStreamCreate")
        self._buffers: dict[str, Buffer] = {}
        self._tensors: Mapping[str, Tensor] = {}

    def hold(self, tensors: Mapping[str, Tensor], components: Sequence[str]) -> None:
        """Allocate tensors (name -> (shape, dtype)) and load the engines of components that are not loaded yet."""
        for component in components:
            if component not in self._engines:
                self._engines[component] = self._open(component)
        for name, (shape, dtype) in tensors.items():
            buffer = self._buffers.setdefault(name, Buffer(self._cuda))
            buffer.hold(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self._tensors = tensors

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Copy an array from the host."""
        if (array.shape, str(array.dtype)) != self._tensors[name]:
            raise BackendError(f"{name}: got {array.dtype} {array.shape}, the device holds {self._tensors[name]}")
        self._cuda.upload(np.ascontiguousarray(array), self._buffers[name].address, self._stream)

    def read(self, name: str) -> NDArray[Any]:
        """Copy a tensor to the host after all launched work. The array belongs to the caller."""
        array = empty(*self._tensors[name])
        self._cuda.download(self._buffers[name].address, array, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return array

    def copy(self, source: str, target: str) -> None:
        """Copy a tensor to another one of the same shape on the device."""
        shape, dtype = self._tensors[target]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._cuda.move(self._buffers[source].address, self._buffers[target].address, size, self._stream)

    def launch(self, component: str) -> None:
        """Run an engine on its tensors.

        Raises:
            BackendError: The shapes fit no profile of the engine, or the GPU failed.
        """
        engine = self._engines[component]
        names = [tensor.name for tensor in (*engine.spec.inputs, *engine.spec.outputs)]
        shapes = {tensor.name: self._tensors[tensor.name][0] for tensor in engine.spec.inputs}
        engine.launch(shapes, {name: self._buffers[name].address for name in names}, self._stream)

    def close(self) -> None:
        """Free the memory and the engines of the step graphs."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        for name, engine in self._engines.items():
            if name != UNET:
                engine.close()
        self._engines = {UNET: self._engines[UNET]}
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()
        self._cuda.call("cudaStreamDestroy", self._stream)
