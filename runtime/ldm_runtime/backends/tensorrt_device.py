"""TensorRT as a device of the denoising loop: engines that share device memory, in the order of one stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends.cuda import Buffer, empty
from ldm_runtime.backends.tensorrt import LoadedEngine
from ldm_runtime.device_loop import Tensor
from ldm_runtime.errors import BackendError


class TensorRtDevice:
    """Runs engines on shared tensors.

    Args:
        unet: the UNet's engine, loaded; it is not closed by this.
        open_step: component → its engine, loaded at the first use.

    Raises:
        BackendError: no GPU.
    """

    def __init__(self, unet: LoadedEngine, open_step: Callable[[str], LoadedEngine]):
        self._open, self._cuda = open_step, unet.cuda
        self._engines = {"unet": unet}
        self._stream = self._cuda.call("cudaStreamCreate")
        self._buffers: dict[str, Buffer] = {}
        self._tensors: Mapping[str, Tensor] = {}

    def hold(self, tensors: Mapping[str, Tensor], components: Sequence[str]) -> None:
        """Have memory for these tensors, and the engines loaded."""
        for component in components:
            if component not in self._engines:
                self._engines[component] = self._open(component)
        for name, (shape, dtype) in tensors.items():
            buffer = self._buffers.setdefault(name, Buffer(self._cuda))
            buffer.hold(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self._tensors = tensors

    def write(self, name: str, array: NDArray[Any]) -> None:
        """Copy from the host."""
        if (array.shape, str(array.dtype)) != self._tensors[name]:
            raise BackendError(f"{name}: got {array.dtype} {array.shape}, the device holds {self._tensors[name]}")
        self._cuda.upload(np.ascontiguousarray(array), self._buffers[name].address, self._stream)

    def read(self, name: str) -> NDArray[Any]:
        """Copy to the host, once all that was launched has ended."""
        array = empty(*self._tensors[name])
        self._cuda.download(self._buffers[name].address, array, self._stream)
        self._cuda.call("cudaStreamSynchronize", self._stream)
        return array

    def copy(self, source: str, target: str) -> None:
        """Copy on the device."""
        shape, dtype = self._tensors[target]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._cuda.move(self._buffers[source].address, self._buffers[target].address, size, self._stream)

    def launch(self, component: str) -> None:
        """Run an engine on what its tensors hold.

        Raises:
            BackendError: the shapes fit no profile of the engine, or the GPU failed.
        """
        engine = self._engines[component]
        names = [tensor.name for tensor in (*engine.spec.inputs, *engine.spec.outputs)]
        shapes = {tensor.name: self._tensors[tensor.name][0] for tensor in engine.spec.inputs}
        engine.launch(shapes, {name: self._buffers[name].address for name in names}, self._stream)

    def close(self) -> None:
        """Free memory and the engines of the steps."""
        self._cuda.call("cudaStreamSynchronize", self._stream)
        for name, engine in self._engines.items():
            if name != "unet":
                engine.close()
        self._engines = {"unet": self._engines["unet"]}
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()
        self._cuda.call("cudaStreamDestroy", self._stream)
