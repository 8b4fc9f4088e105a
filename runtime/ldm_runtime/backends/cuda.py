"""The part of the CUDA runtime that engines need, through cuda-python: devices, memory, streams and graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends.driver import no_gpu
from ldm_runtime.backends.host import import_engine
from ldm_runtime.errors import BackendError

__all__ = ["Buffer", "Cuda", "empty"]


class Cuda:
    """Calls functions of the CUDA runtime and raises their errors.

    Args:
        extra: Extra of the package ldm-export that installs cuda-python, for the message if it is missing.

    Raises:
        BackendError: cuda-python is not installed or cannot be loaded, or there is no GPU or no driver.
    """

    def __init__(self, extra: str = "tensorrt-rtx") -> None:
        runtime: Any = import_engine("cuda.bindings.runtime", extra)
        self._runtime = runtime
        try:
            error, count = runtime.cudaGetDeviceCount()
        except RuntimeError as failure:  # there is no driver library
            raise no_gpu(str(failure)) from None
        if int(error) or not count:
            raise no_gpu(self._text(error))

    def _text(self, error: Any) -> str:
        return bytes(self._runtime.cudaGetErrorString(error)[1]).decode()

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the runtime and return its results without the error code.

        Raises:
            BackendError: The function failed.
        """
        error, *results = getattr(self._runtime, name)(*arguments)
        if int(error):
            raise BackendError(f"{name}: {self._text(error)}; free GPU memory, or check the driver")
        return results[0] if len(results) == 1 else tuple(results)

    def capability(self, device: int = 0) -> str:
        """Return the compute capability of a GPU, e.g. "8.9"."""
        attributes = self._runtime.cudaDeviceAttr
        kinds = (attributes.cudaDevAttrComputeCapabilityMajor, attributes.cudaDevAttrComputeCapabilityMinor)
        return ".".join(str(self.call("cudaDeviceGetAttribute", kind, device)) for kind in kinds)

    def upload(self, array: NDArray[Any], address: int, stream: Any) -> None:
        """Copy an array to the device, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, address: int, array: NDArray[Any], stream: Any) -> None:
        """Copy from the device into an array, in stream order. Synchronise the stream before reading it."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def move(self, source: int, target: int, size: int, stream: Any) -> None:
        """Copy ``size`` bytes on the device, in stream order."""
        self.call(
            "cudaMemcpyAsync", target, source, size, self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice, stream
        )

    def spread(self, source: int, target: int, size: int, count: int, pitch: int, stream: Any) -> None:
        """Copy ``count`` adjacent blocks of ``size`` bytes to ``target``, ``target + pitch``, …, in stream order."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", target, pitch, source, size, size, count, kind, stream)

    def create_stream(self) -> Any:
        """Return a stream that does not wait for the default stream."""
        return self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def create_event(self) -> Any:
        """Return an event that records no time."""
        return self.call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)

    def end_failed_capture(self, stream: Any) -> None:
        """End a capture that an error has interrupted, so that the stream can be used again."""
        self._runtime.cudaStreamEndCapture(stream)
        self._runtime.cudaGetLastError()

    def begin_capture(self, stream: Any) -> None:
        """Begin to record the stream's work instead of running it."""
        self.call("cudaStreamBeginCapture", stream, self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)

    def end_capture(self, stream: Any) -> Any:
        """Return the recorded work, ready for ``cudaGraphLaunch``."""
        graph = self.call("cudaStreamEndCapture", stream)
        ready = self.call("cudaGraphInstantiate", graph, 0)
        self.call("cudaGraphDestroy", graph)
        return ready


class Buffer:
    """Device memory of one tensor, which grows when a larger tensor needs it."""

    def __init__(self, cuda: Cuda):
        self._cuda, self.address, self._bytes = cuda, 0, 0

    def hold(self, size: int) -> int:
        """Reserve ``size`` bytes and return the address, which changes only when the buffer grows."""
        if size > self._bytes:
            self.free()
            self.address, self._bytes = int(self._cuda.call("cudaMalloc", size)), size
        return self.address

    def free(self) -> None:
        """Free the memory."""
        if self.address:
            self._cuda.call("cudaFree", self.address)
        self.address = self._bytes = 0


def empty(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Return an uninitialised host array for a result."""
    return np.empty(shape, np.dtype(dtype))
