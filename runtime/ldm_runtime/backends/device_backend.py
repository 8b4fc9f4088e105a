"""A backend that runs a component on memory of a device and copies inputs and outputs from and to the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Feed, SpecBackend
from ldm_runtime.backends.onnxruntime_launcher import OnnxRuntimeLauncher
from ldm_runtime.device import Call, Memory, Tensor, Workspace, WorkspaceCache
from ldm_runtime.specs import ComponentSpec, check_feed, sizes_of

__all__ = ["DeviceBackend"]

KEPT_SHAPES = 4
"""Sets of shapes whose tensors and captured launches are kept."""
USABLE = 0.8
"""Share of the free memory that a call may use; the rest is for other components and processes."""


class DeviceBackend(SpecBackend):
    """Runs one component on a device. On CUDA, calls that repeat a shape are captured and replayed as CUDA graphs.

    Args:
        launcher: The component. Its dtypes may differ from those of the spec; arrays are converted.
        spec: Inputs and outputs as callers see them.
        memory: The device's memory.
    """

    def __init__(self, launcher: OnnxRuntimeLauncher, spec: ComponentSpec, memory: Memory):
        self._spec, self.launcher, self._memory = spec, launcher, memory
        self._workspaces = WorkspaceCache(KEPT_SHAPES)
        self._tensors_per_value = self._engine_per_value = self._engine = 0.0
        self.device = memory.device

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the component once.

        Raises:
            SpecError: The feed does not fit the spec.
            BackendError: The engine failed, e.g. because memory ran out.
        """
        check_feed(self._spec, feed)
        shapes = {tensor.name: feed[tensor.name].shape for tensor in self._spec.inputs}
        key = tuple(sorted(shapes.items()))
        with self._memory.lock:
            before = None if key in self._workspaces else self._memory.used()
            space = self._workspaces.get(key, lambda: self._workspace(shapes))
            for name, array in feed.items():
                space.write(name, array)
            space.run(self._spec.name)
            results = {tensor.name: np.asarray(space.read(tensor.name), tensor.dtype) for tensor in self._spec.outputs}
            if before is not None:
                self._measure(space, self._memory.used() - before, sum(array.size for array in feed.values()))
        return results

    def _measure(self, space: Workspace, growth: int, values: int) -> None:
        """Record what the first call with a shape allocated: its tensors, and memory that the engine keeps."""
        tensors = sum(region.nbytes for region in space.regions.values())
        self._tensors_per_value = tensors / values
        if growth > tensors:
            self._engine_per_value = (growth - tensors) / values
            self._engine += growth - tensors

    def most_rows(self, feed: Feed) -> int | None:
        """Number of rows of such inputs that fit into free memory and memory the component already has, at least 1.

        The memory of a row is measured in the first call, which has one row. If fewer rows fit than are asked for,
        their number is rounded down to a power of two, so that few different shapes are prepared.
        """
        with self._memory.lock:
            available = self._memory.available()
        if available is None:
            return None
        if not self._tensors_per_value:
            return 1
        values = sum(array[0].size for array in feed.values())
        free, own = USABLE * available, self._tensors_per_value * values
        both = (free + self._engine) / (own + self._engine_per_value * values)
        rows, fitting = min(map(len, feed.values())), max(1, int(min(both, free / own)))
        return rows if fitting >= rows else 1 << (fitting.bit_length() - 1)

    def _workspace(self, shapes: dict[str, tuple[int, ...]]) -> Workspace:
        spec = self.launcher.spec
        sizes = sizes_of(spec, shapes)
        tensors: dict[str, Tensor] = {
            tensor.name: (tensor.shape_at(sizes), tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)
        }
        label = f"{spec.name} for {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}"
        return Workspace(self._memory, tensors, {spec.name: Call(self.launcher, {})}, label, repeated=False)

    def memory(self) -> dict[str, int]:
        """Bytes of device memory for each shape in the cache, including what the engine allocated for it."""
        with self._memory.lock:
            return self._workspaces.bytes()

    def close(self) -> None:
        """Free the tensors and the session."""
        with self._memory.lock:
            self._workspaces.close()
            self.launcher.close()
