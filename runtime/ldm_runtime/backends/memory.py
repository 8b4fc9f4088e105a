"""Implementations of ``device.Memory``: for the host, and for a CUDA GPU with its two streams."""

from __future__ import annotations

import ctypes
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.device import Region
from ldm_runtime.errors import BackendError
from ldm_runtime.once import once

__all__ = ["CudaMemory", "HostMemory", "cuda_memory", "memory_of"]


class HostMemory:
    """Memory of the host. All work is done when a call returns. It stands in for ``CudaMemory`` on the CPU."""

    device = "cpu"

    def __init__(self) -> None:
        self.lock = RLock()
        self._blocks: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes, which are zero."""
        block = np.zeros(size, np.uint8)
        self._blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        """Free what ``allocate`` returned."""
        del self._blocks[address]

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to an address."""
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    upload_ahead = upload

    def hold_uploads(self) -> None:
        """All work is done already."""

    await_uploads = synchronise = hold_uploads

    def mark(self) -> object:
        """All work is done already."""
        return None

    def wait(self, mark: object) -> None:
        """All work is done already."""

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy from an address to a contiguous array."""
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def move(self, source: int, target: int, size: int) -> None:
        """Copy ``size`` bytes."""
        ctypes.memmove(target, source, size)

    def spread(self, source: Region, target: int, pitch: int) -> None:
        """Copy the rows of a region to ``target``, ``target + pitch``, …."""
        for row in range(source.shape[0]):
            ctypes.memmove(target + row * pitch, source.address + row * source.row_bytes, source.row_bytes)

    def used(self) -> int:
        """Bytes that are allocated."""
        return sum(block.nbytes for block in self._blocks.values())

    def available(self) -> int | None:
        """None: the free memory is not known."""
        return None


class CudaMemory:
    """Memory of a GPU, with a main stream for all work and a second stream for concurrent uploads.

    Args:
        cuda: The CUDA runtime.

    Raises:
        BackendError: The GPU failed.
    """

    device = "cuda"

    def __init__(self, cuda: Cuda):
        self.cuda, self.lock = cuda, RLock()
        self.stream, self._copies = cuda.create_stream(), cuda.create_stream()
        self._uploaded, self._reached = cuda.create_event(), cuda.create_event()

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes, which are zero."""
        address = int(self.cuda.call("cudaMalloc", size))
        self.cuda.call("cudaMemsetAsync", address, 0, size, self.stream)
        return address

    def free(self, address: int) -> None:
        """Free what ``allocate`` returned."""
        self.cuda.call("cudaFree", address)

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array from the host. CUDA keeps a copy of pageable memory, so the array may be changed."""
        self.cuda.upload(array, address, self.stream)

    def upload_ahead(self, array: NDArray[Any], address: int) -> None:
        """As ``upload``, on the stream for uploads."""
        self.cuda.upload(array, address, self._copies)

    def hold_uploads(self) -> None:
        """Make the stream for uploads wait for the work that is queued on the main stream now."""
        self.cuda.call("cudaEventRecord", self._reached, self.stream)
        self.cuda.call("cudaStreamWaitEvent", self._copies, self._reached, 0)

    def await_uploads(self) -> None:
        """Make the main stream wait for the uploads so far."""
        self.cuda.call("cudaEventRecord", self._uploaded, self._copies)
        self.cuda.call("cudaStreamWaitEvent", self.stream, self._uploaded, 0)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy to a contiguous array, after all queued work."""
        self.cuda.download(address, array, self.stream)
        self.synchronise()

    def move(self, source: int, target: int, size: int) -> None:
        """Copy ``size`` bytes on the device."""
        self.cuda.move(source, target, size, self.stream)

    def spread(self, source: Region, target: int, pitch: int) -> None:
        """Copy the rows of a region to ``target``, ``target + pitch``, …."""
        self.cuda.spread(source.address, target, source.row_bytes, source.shape[0], pitch, self.stream)

    def mark(self) -> object:
        """Return an event that follows all queued work."""
        event = self.cuda.create_event()
        self.cuda.call("cudaEventRecord", event, self.stream)
        return event

    def wait(self, mark: object) -> None:
        """Wait for the work before an event, and free the event."""
        self.cuda.call("cudaEventSynchronize", mark)
        self.cuda.call("cudaEventDestroy", mark)

    def synchronise(self) -> None:
        """Wait for all queued work."""
        self.cuda.call("cudaStreamSynchronize", self.stream)

    def used(self) -> int:
        """Bytes of the GPU that are in use, also by other processes."""
        free, total = self.cuda.call("cudaMemGetInfo")
        return int(total) - int(free)

    def available(self) -> int | None:
        """Bytes of the GPU that are free."""
        return int(self.cuda.call("cudaMemGetInfo")[0])


@once
def cuda_memory(extra: str) -> CudaMemory:
    """Return the memory of the GPU: one object per process and extra.

    While one thread captures a CUDA graph, no other thread may allocate memory or wait for the device, because that
    ends the capture. All work of ONNX Runtime on the GPU therefore shares one lock and one stream.

    Args:
        extra: Extra of the package ldm-export that installs cuda-python, for the message if it is missing.

    Raises:
        BackendError: cuda-python is not installed, or there is no GPU or no driver.
    """
    return CudaMemory(Cuda(extra))


def memory_of(device: str, extra: str) -> HostMemory | CudaMemory:
    """Memory of "cpu" or "cuda".

    Raises:
        BackendError: The device is unknown, or as ``cuda_memory``.
    """
    if device == "cpu":
        return HostMemory()
    if device == "cuda":
        return cuda_memory(extra)
    raise BackendError(f"device: got {device!r:.40}, expected cpu or cuda")
