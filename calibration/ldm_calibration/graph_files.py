"""Reads graph files: constants as initializers, external weights mapped into memory instead of read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from ldm_runtime.atomic_files import sha256
from ldm_runtime.bundle_layout import weights_beside

__all__ = ["MappedTensor", "files_of", "graph_digest", "load_graph"]

COPY_BYTES = 64_000_000
"""Number of bytes that ``MappedTensor.tofile`` writes at once."""


class MappedTensor(ir.ExternalTensor):
    """A tensor in the file of a graph's external weights.

    Unlike ``onnx_ir.ExternalTensor``, it accepts a file with several hard links, which builds create. Each access maps
    the file again, so that no mapping outlives its use.
    """

    def numpy(self) -> NDArray[Any]:
        """The values, mapped read-only."""
        shape, dtype = self.shape.numpy(), self.dtype.numpy()
        if not self.size:
            return np.empty(shape, dtype)
        return np.memmap(self.path, dtype, "r", self.offset or 0, shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.numpy(), dtype) if copy is None else np.array(self.numpy(), dtype, copy=copy)

    def tobytes(self) -> bytes:
        """The values in the byte order of the file."""
        return self.numpy().tobytes()

    def tofile(self, file: Any) -> None:
        """Write the values to a binary file."""
        values = self.numpy().reshape(-1).view(np.uint8)
        for start in range(0, len(values), COPY_BYTES):
            file.write(values[start : start + COPY_BYTES].tobytes())


def load_graph(path: Path) -> ir.Model:
    """Read a graph of a bundle or a build.

    Constants become initializers. External weights stay in their file beside the graph. They are mapped on use, and a
    model that is saved or passed to ONNX Runtime can refer to them.

    Args:
        path: Graph file. The location of its external weights is reduced to a file name in the same folder.
    """
    model = ir.load(path)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = MappedTensor(
                Path(tensor.location).name,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=tensor.name,
                base_dir=path.parent,
            )
    return model


def files_of(graph: Path) -> list[Path]:
    """The files of a graph: the graph itself and, if it has one, the file of its external weights."""
    weights = weights_beside(graph)
    return [graph, weights] if weights.is_file() else [graph]


def graph_digest(graph: Path) -> str:
    """SHA-256 of a graph, followed by a hyphen and the SHA-256 of its external weights if it has any."""
    return "-".join(sha256(file) for file in files_of(graph))
