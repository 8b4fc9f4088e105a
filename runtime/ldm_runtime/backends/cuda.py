"""The little of the CUDA runtime that engines need, through cuda-python: devices, memory, streams, graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends.host import import_engine
from ldm_runtime.errors import BackendError


class Cuda:
    """The CUDA runtime with errors raised.

    Raises:
        BackendError: cuda-python is not installed or broken, or there is no GPU or driver.
    """

    def __init__(self) -> None:
        runtime: Any = import_engine("cuda.bindings.runtime", 'pip install "ldm-export[tensorrt-rtx]"')
        self._runtime = runtime
        try:
            error, count = runtime.cudaGetDeviceCount()
        except RuntimeError as failure:  # no driver library at all
            raise BackendError(_no_gpu(str(failure))) from None
        if int(error) or not count:
            raise BackendError(_no_gpu(self._text(error)))

    def _text(self, error: Any) -> str:
        return bytes(self._runtime.cudaGetErrorString(error)[1]).decode()

    def call(self, name: str, *arguments: Any) -> Any:
        """One function of the runtime; its results without the error code.

        Raises:
            BackendError: it failed.
        """
        error, *results = getattr(self._runtime, name)(*arguments)
        if int(error):
            raise BackendError(f"{name}: {self._text(error)}; free GPU memory, or check the driver")
        return results[0] if len(results) == 1 else tuple(results)

    def capability(self, device: int = 0) -> str:
        """Compute capability of a GPU, e.g. "8.9"."""
        attributes = self._runtime.cudaDeviceAttr
        kinds = (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
        return ".".join(str(self.call("cudaDeviceGetAttribute", kind, device)) for kind in kinds)

    def upload(self, array: NDArray[Any], address: int, stream: Any) -> None:
        """Copy an array to the device, in the stream's order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, address: int, array: NDArray[Any], stream: Any) -> None:
        """Copy from the device into an array, in the stream's order; synchronise before reading it."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def move(self, source: int, target: int, size: int, stream: Any) -> None:
        """Copy ``size`` bytes on the device, in the stream's order."""
        self.call(
            "cudaMemcpyAsync", target, source, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream
        )

    def begin_capture(self, stream: Any) -> None:
        """From here on the stream's work is recorded, not done."""
        self.call("cudaStreamBeginCapture", stream, self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)

    def end_capture(self, stream: Any) -> Any:
        """What was recorded, ready for ``cudaGraphLaunch``."""
        graph = self.call("cudaStreamEndCapture", stream)
        ready = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return ready


class Buffer:
    """Device memory of one tensor, grown when a larger one comes."""

    def __init__(self, cuda: Cuda):
        self._cuda, self.address, self._bytes = cuda, 0, 0

    def hold(self, size: int) -> int:
        """Make room for ``size`` bytes; returns the address, which changes only when the buffer grows."""
        if size > self._bytes:
            self.free()
            self.address, self._bytes = int(self._cuda.call("cudaMalloc", size)), size
        return self.address

    def free(self) -> None:
        """Give the memory back."""
        if self.address:
            self._cuda.call("cudaFree", self.address)
        self.address = self._bytes = 0


def empty(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """A host array for a result, the caller's to keep."""
    return np.empty(shape, np.dtype(dtype))


def _no_gpu(reason: str) -> str:
    return f"no CUDA GPU can be used ({reason}); engines need one. Without, run the graphs: --backend onnxruntime"
