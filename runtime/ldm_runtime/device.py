"""Tensors in the memory of a device, and components of a model that run on them in the order of one stream."""

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
    """Memory of one tensor: address on the device, shape and dtype. Axis 0 counts rows."""

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
        """The rows from ``start`` to ``stop``, which is excluded.

        Raises:
            BackendError: There are no such rows.
        """
        if not 0 <= start < stop <= self.shape[0]:
            raise BackendError(f"device: got rows {start}:{stop} of a tensor with {self.shape[0]} rows; report it")
        return Region(self.address + start * self.row_bytes, (stop - start, *self.shape[1:]), self.dtype)


class Memory(Protocol):
    """Memory of a device, and the stream in whose order copies and launches happen.

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
        """As ``upload``, but beside the work of the stream, from the last ``hold_uploads`` on."""

    def hold_uploads(self) -> None:
        """Let the next ``upload_ahead`` wait for the work that the stream has now."""

    def await_uploads(self) -> None:
        """Let the next work of the stream wait for every ``upload_ahead`` so far."""

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy to a contiguous array, after all work so far."""

    def move(self, source: int, target: int, size: int) -> None:
        """Copy ``size`` bytes on the device; the two may not overlap."""

    def spread(self, source: Region, target: int, pitch: int) -> None:
        """Copy the rows of a region to ``target``, ``target + pitch``, … on the device."""

    def mark(self) -> object:
        """Return a mark behind the work so far, for ``wait``."""

    def wait(self, mark: object) -> None:
        """Wait for the work before a mark, which is used once."""

    def synchronise(self) -> None:
        """Wait for all work."""

    def used(self) -> int:
        """Bytes of the device that are in use, 0 if it is not known."""

    def available(self) -> int | None:
        """Bytes of the device that are free, None if it is not known."""


class Prepared(Protocol):
    """A component whose inputs and outputs are bound to regions."""

    def run(self) -> None:
        """Run the component in the order of the stream. Raises BackendError if the engine failed."""

    def close(self) -> None:
        """Free what the engine keeps for these regions. The last run must have finished."""


class Launcher(Protocol):
    """One loaded component that runs on memory of the device."""

    @property
    def spec(self) -> ComponentSpec:
        """Inputs and outputs, with the dtypes of the engine."""

    def prepare(self, tensors: Mapping[str, Region], *, repeated: bool) -> Prepared:
        """Bind inputs and outputs by name.

        Args:
            tensors: Region of every input and output. No output may lie in an input.
            repeated: True prepares for many runs, e.g. captures the launches; this may run the component.

        Raises:
            SpecError: Shapes the component does not take.
            BackendError: The engine failed, e.g. because memory ran out.
        """


@dataclass(frozen=True)
class Call:
    """A component and the names of the tensors it runs on, where they differ from its own names.

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
        tensors: Name -> shape and dtype. They are zero at first.
        calls: Name -> call.
        label: What the tensors are for, in a few words.
        repeated: True if each call runs many times.

    Attributes:
        in_use: True if a cache must keep it.

    Raises:
        SpecError, BackendError: As ``Launcher.prepare``, and if the memory is short.
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
        """As ``write``, beside the work of the stream; see ``Memory.upload_ahead``."""
        self._memory.upload_ahead(*self._source(name, array, row))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Copy rows to the host after all work so far. The array belongs to the caller."""
        region = self.regions[name]
        part = region.rows(start, region.shape[0] if stop is None else stop)
        array = np.empty(part.shape, part.dtype)
        self._memory.download(part.address, array)
        return array

    def copy(self, source: Region, target: Region) -> None:
        """Copy between regions of one size, which may not overlap."""
        if source.nbytes != target.nbytes:
            raise BackendError(f"device: got {source} to copy to {target}; report it")
        self._memory.move(source.address, target.address, source.nbytes)

    def run(self, call: str) -> None:
        """Run a call in the order of the stream; it may still run on return. Raises BackendError if it failed."""
        self._calls[call].run()

    def close(self) -> None:
        """Wait for the device and free the memory, also after a failure of the device."""
        with suppress(BackendError):
            self._memory.synchronise()
        for call in self._calls.values():
            call.close()
        self._calls.clear()
        with suppress(BackendError):
            self._memory.free(self._block)


class WorkspaceCache:
    """The workspaces used last, so that shapes may alternate without being prepared again.

    Args:
        limit: Maximum number of workspaces. One more frees the one that was not used for the longest time.
    """

    def __init__(self, limit: int = 8):
        self._limit = limit
        self._kept: OrderedDict[Hashable, Workspace] = OrderedDict()

    def get(self, key: Hashable, create: Callable[[], Workspace]) -> Workspace:
        """Return the workspace of a key, made by ``create`` if there is none.

        If there is no memory for it, the others are freed first, except those in use.
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
        """Keys of the workspaces that are not in use, the one that was used last at the end."""
        return [key for key, workspace in self._kept.items() if not workspace.in_use]

    def bytes(self) -> dict[str, int]:
        """Memory of each workspace in bytes, by its label, the one used last at the end."""
        total: dict[str, int] = {}
        for workspace in self._kept.values():
            total[workspace.label] = total.pop(workspace.label, 0) + workspace.bytes
        return total

    def close(self) -> None:
        """Free all workspaces that are not in use."""
        for key in self._free_keys():
            self._kept.pop(key).close()
