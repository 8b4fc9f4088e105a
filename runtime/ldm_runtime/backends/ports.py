"""Compares the inputs and outputs that a loaded graph declares with those of the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_runtime.errors import ManifestError
from ldm_runtime.specs import TensorSpec

__all__ = ["Port", "check_ports"]

Port = tuple[str, int | None]
"""Dtype and rank of an input or output. The dtype may be an engine's name for an unsupported type; the rank is None if
unknown."""


def check_ports(graph: Path, side: str, ports: Mapping[str, Port], tensors: Sequence[TensorSpec]) -> None:
    """Check names, dtypes and ranks before the graph runs: an engine may crash on e.g. an output of strings.

    Args:
        graph: Path of the graph, for messages.
        side: "inputs" or "outputs".
        ports: Name -> dtype and rank that the graph declares.
        tensors: Inputs or outputs in the manifest.

    Raises:
        ManifestError: They differ.
    """
    expected = {tensor.name: tensor for tensor in tensors}
    if set(ports) != set(expected):
        raise ManifestError(f"{graph}: {side} are {sorted(ports)}, the manifest says {sorted(expected)}; rebuild")
    for name, (dtype, rank) in ports.items():
        tensor = expected[name]
        if dtype != tensor.dtype or rank not in (None, len(tensor.shape)):
            actual = dtype if rank is None else f"{dtype} of {rank} dimensions"
            raise ManifestError(f"{graph}: {side}: {name} is {actual}, the manifest says {tensor}; rebuild the bundle")
