"""Interfaces and tensors of a device: its memory, its stream, and components that run on tensors in its memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from threading import RLock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import BackendError
from ldm_runtime.specs import ComponentSpec

__all__ = ["Call", "Launcher", "Memory", "Prepared", "Region", "Tensor", "Workspace", "WorkspaceCache"]

Tensor = tuple[tuple[int, ...], str]
"""Shape and dtype."""
ALIGNMENT = 256
"""Bytes to which the address of a tensor is aligned, as cudaMalloc does."""


@dataclass(frozen=True)
class Region:
    """Memory region of one tensor: address on the device, shape and dtype. Axis 0 counts rows."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape[0] * self.row_bytes

    def rows(self, start: int, stop: int) -> Region:
        """The region of the rows from ``start`` to ``stop``, excluding ``stop``.

        Raises:
            BackendError: There are no such rows.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise BackendError(f"device: got rows {start}:{stop} of a tensor with {self.shape[0]} rows; report it")
        return Region(self.address + start * self.row_bytes, (stop - start, *self.shape[1:]), self.dtype)


class Memory(Protocol):
    """Memory of a device, and its main stream, in whose order copies and launches happen.

    All calls except ``download``, ``wait`` and ``synchronise`` may return before the device has done the work.
    """

    @property
    def device(self) -> str:
        """Name of the device: "cpu" or "cuda"."""

    @property
    def lock(self) -> RLock:
        """Held while the device is used; reentrant."""

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes, which are zero."""

    def free(self, address: int) -> None:
        """Free what ``allocate`` returned. No work may use it any more."""

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a contiguous array from the host; it may be changed afterwards."""

    def upload_ahead(self, array: NDArray[Any], address: int) -> None:
        """Like ``upload``, but concurrently with the main stream, after the work at the last ``hold_uploads``."""

    def hold_uploads(self) -> None:
        """Make later calls of ``upload_ahead`` wait for the work that is queued on the main stream now."""

    def await_uploads(self) -> None:
        """Make later work on the main stream wait for every ``upload_ahead`` so far."""

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy to a contiguous array after all queued work, and wait for it."""

    def move(self, source: int, target: int, size: int) -> None:
        """Copy ``size`` bytes on the device; the two may not overlap."""

    def spread(self, source: Region, target: int, pitch: int) -> None:
        """Copy the rows of a region to ``target``, ``target + pitch``, … on the device."""

    def mark(self) -> object:
        """Return a mark after all queued work, for ``wait``."""

    def wait(self, mark: object) -> None:
        """Wait for the work before a mark. A mark can be used once."""

    def synchronise(self) -> None:
        """Wait for all queued work."""

    def used(self) -> int:
        """Bytes of device memory in use; 0 if not known."""

    def available(self) -> int | None:
        """Bytes of free device memory; None if not known."""


class Prepared(Protocol):
    """A component whose inputs and outputs are bound to regions."""

    def run(self) -> None:
        """Run the component in stream order. Raises BackendError if the engine failed."""

    def close(self) -> None:
        """Free what the engine allocated for these regions. The last run must have finished."""


class Launcher(Protocol):
    """Interface of a loaded component that runs on device memory."""

    @property
    def spec(self) -> ComponentSpec:
        """Inputs and outputs, with the dtypes of the engine."""

    def prepare(self, tensors: Mapping[str, Region], *, repeated: bool) -> Prepared:
        """Bind inputs and outputs by name.

        Args:
            tensors: Region of every input and output. An output must not overlap an input.
            repeated: True prepares for many runs, e.g. captures the launches; this may run the component.

        Raises:
            SpecError: The component does not take the shapes.
            BackendError: The engine failed, e.g. because memory ran out.
        """


@dataclass(frozen=True)
class Call:
    """A component, and the names of the tensors it runs on where these differ from its own names.

    Attributes:
        launcher: The component.
        names: Its input or output -> name of the tensor.
    """

    launcher: Launcher
    names: Mapping[str, str]


class Workspace:
    """Named tensors of fixed shapes in one block of memory, and calls that are bound to them.

    Args:
        memory: The device's memory.
        tensors: Name -> shape and dtype. Their initial values are zero.
        calls: Name -> call.
        label: Short description of the workspace for memory reports.
        repeated: True if each call runs many times.

    Attributes:
        in_use: True if the cache must not free it.

    Raises:
        SpecError, BackendError: As ``Launcher.prepare``; also if there is not enough memory.
    """

    def __init__(
        self,
        memory: Memory,
        tensors: Mapping[str, Tensor],
        calls: Mapping[str, Call],
        label: str,
        *,
        repeated: bool = True,
    ):
        self.label, self.in_use = label, False
        self._memory = memory
        self._calls: dict[str, Prepared] = {}
        before, size, offsets = memory.used(), 0, {}
        for name, (shape, dtype) in tensors.items():
            offsets[name] = size
            size += -(-prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self._block = memory.allocate(max(size, ALIGNMENT))
        self.regions = {name: Region(self._block + offsets[name], *tensors[name]) for name in tensors}
        try:
            for name, call in calls.items():
                self._calls[name] = call.launcher.prepare(self._bound(call), repeated=repeated)
        except BaseException:
            self.close()
            raise
        self.bytes = max(size, memory.used() - before)
        """Bytes of the tensors and of what the engines allocated for them."""

    def _bound(self, call: Call) -> dict[str, Region]:
        spec, bound = call.launcher.spec, {}
        for tensor in (*spec.inputs, *spec.outputs):
            region = self.regions[call.names.get(tensor.name, tensor.name)]
            if region.dtype != tensor.dtype:
                raise BackendError(
                    f"{spec.name}: {tensor.name} is {tensor.dtype}, the device holds {region.dtype}; rebuild the bundle"
                )
            bound[tensor.name] = region
        return bound

    def _source(self, name: str, array: NDArray[Any], row: int) -> tuple[NDArray[Any], int]:
        region = self.regions[name]
        if array.shape[1:] != region.shape[1:]:
            raise BackendError(f"{name}: got {list(array.shape)}, the device holds {list(region.shape)}; report it")
        return np.ascontiguousarray(array, region.dtype), region.rows(row, row + len(array)).address

    def write(self, name: str, array: NDArray[Any], row: int = 0) -> None:
        """Copy rows from the host, from ``row`` on, converted to the tensor's dtype."""
        self._memory.upload(*self._source(name, array, row))

    def write_ahead(self, name: str, array: NDArray[Any], row: int = 0) -> None:
        """Like ``write``, but concurrently with the main stream; see ``Memory.upload_ahead``."""
        self._memory.upload_ahead(*self._source(name, array, row))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Copy rows to the host after all queued work. The array belongs to the caller."""
        region = self.regions[name]
        part = region.rows(start, region.shape[0] if stop is None else stop)
        array = np.empty(part.shape, part.dtype)
        self._memory.download(part.address, array)
        return array

    def copy(self, source: Region, target: Region) -> None:
        """Copy between regions of equal size that do not overlap."""
        if source.nbytes != target.nbytes:
            raise BackendError(f"device: got {source} to copy to {target}; report it")
        self._memory.move(source.address, target.address, source.nbytes)

    def run(self, call: str) -> None:
        """Run a call in stream order; it may still be running on return. Raises BackendError if it failed."""
        self._calls[call].run()

    def close(self) -> None:
        """Wait for the device and free the memory, even if the device has failed."""
        with suppress(BackendError):
            self._memory.synchronise()
        for call in self._calls.values():
            call.close()
        self._calls.clear()
        with suppress(BackendError):
            self._memory.free(self._block)


class WorkspaceCache:
    """Cache of recently used workspaces, so that alternating shapes are not prepared again.

    Args:
        limit: Maximum number of workspaces. Beyond it, the least recently used workspace is freed.
    """

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._kept: OrderedDict[Hashable, Workspace] = OrderedDict()

    def get(self, key: Hashable, create: Callable[[], Workspace]) -> Workspace:
        """Return the workspace of a key; ``create`` makes it if it is not in the cache.

        If there is not enough memory, all workspaces that are not in use are freed first.
        """
        if key not in self._kept:
            for old in self._free_keys()[: max(0, len(self._kept) + 1 - self._limit)]:
                self._kept.pop(old).close()
            try:
                self._kept[key] = create()
            except BackendError:
                if not self._free_keys():
                    raise
                self.close()
                self._kept[key] = create()
        self._kept.move_to_end(key)
        return self._kept[key]

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def _free_keys(self) -> list[Hashable]:
        """Keys of the workspaces that are not in use, the most recently used last."""
        return [key for key, workspace in self._kept.items() if not workspace.in_use]

    def bytes(self) -> dict[str, int]:
        """Bytes of memory by label of the workspace, the most recently used last."""
        total: dict[str, int] = {}
        for workspace in self._kept.values():
            total[workspace.label] = total.pop(workspace.label, 0) + workspace.bytes
        return total

    def close(self) -> None:
        """Free all workspaces that are not in use."""
        for key in self._free_keys():
            self._kept.pop(key).close()
