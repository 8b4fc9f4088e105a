"""Find the layers of an ONNX graph and where their weights are stored, without the package onnx.

The exporter names nodes after modules, e.g. ``unet.mid_block.attentions.0.proj_in/Conv``; the passes of engines keep
the beginning. A layer is a node that multiplies by a constant matrix or kernel. The graph is untrusted and is read as
in ``onnx_external``; field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import ManifestError
from ldm_runtime.protobuf_fields import fields, varint

__all__ = ["GraphLayer", "StoredWeight", "graph_layers"]

_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_INPUT, _NAME, _OPERATOR, _ATTRIBUTE = 1, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INTEGER = 1, 3
_DIMS, _TYPE, _TENSOR_NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13
_KEY, _VALUE = 1, 2
_DTYPES = {1: "float32", 10: "float16"}
_MATRIX, _LINEAR, _KERNEL, _LAST = "matrix", "linear", "kernel", "channels last"
_LAYOUTS = {"MatMul": _MATRIX, "Gemm": _MATRIX, "Conv": _KERNEL, "NhwcConv": _LAST}


@dataclass(frozen=True)
class StoredWeight:
    """A constant of a graph, and where its values are.

    Attributes:
        name: Name of the initializer.
        dtype: "float32" or "float16".
        shape: As the graph has it.
        file: File with the values: the graph itself, or its external weights.
        offset: Of the values in the file, in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def read(self) -> NDArray[np.floating]:
        """The values, mapped and not yet read.

        Raises:
            ManifestError: The file is too short.
            OSError: It cannot be read.
        """
        if self.offset < 0 or self.offset + self.nbytes > self.file.stat().st_size:
            raise ManifestError(f"{self.file}: too short for the values of {self.name!r:.80}; rebuild the bundle")
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


@dataclass(frozen=True)
class GraphLayer:
    """A layer of a graph.

    Attributes:
        module: Name of its module, without that of the traced wrapper, e.g. "mid_block.attentions.0.proj_in".
        weight: Its weight.
        layout: How the graph stores the weight.
    """

    module: str
    weight: StoredWeight
    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as the module has it: [out, in] or [out, in, height, width]."""
        shape = self.weight.shape
        if self.layout == _MATRIX:
            return shape[::-1]
        return (shape[0], shape[3], shape[1], shape[2]) if self.layout == _LAST else shape

    def stored(self, weight: NDArray[np.floating]) -> NDArray[np.floating]:
        """Convert a weight of this shape, or of the same size with a 1 × 1 kernel, to the graph's layout."""
        weight = weight.reshape(self.shape)
        if self.layout == _MATRIX:
            return weight.T
        return weight.transpose(0, 2, 3, 1) if self.layout == _LAST else weight


@dataclass
class _Node:
    """Fields of a node that are read."""

    name: str = ""
    operator: str = ""
    inputs: list[str] = field(default_factory=list)
    integers: dict[str, int] = field(default_factory=dict)


def graph_layers(graph: Path) -> list[GraphLayer]:
    """The layers of a graph in its order.

    Args:
        graph: An ONNX file; its external weights lie beside it.

    Raises:
        ManifestError: The file is not an ONNX graph.
        OSError: It cannot be read.
    """
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            places = [place for place in fields(content, 0, len(content)) if place[0] == _GRAPH and place[2] >= 0]
            parts = [part for _, start, end in places for part in fields(content, start, end) if part[2] >= 0]
            weights = {
                weight.name: weight
                for number, start, end in parts
                if number == _INITIALIZER and (weight := _weight(content, start, end, graph)) is not None
            }
            nodes = [_node(content, start, end) for number, start, end in parts if number == _NODE]
        except (ValueError, IndexError) as error:
            raise ManifestError(f"{graph}: no ONNX graph ({error}); rebuild the bundle") from None
    return list(_layers(nodes, weights))


def _layers(nodes: list[_Node], weights: Mapping[str, StoredWeight]) -> Iterator[GraphLayer]:
    for node in nodes:
        layout, weight = _LAYOUTS.get(node.operator), weights.get(node.inputs[1]) if len(node.inputs) > 1 else None
        module = node.name.partition("/")[0].partition(".")[2]
        if layout is None or weight is None or not module:
            continue
        if node.operator == "Gemm" and node.integers.get("transB"):
            layout = _LINEAR
        if len(weight.shape) == (2 if layout in (_MATRIX, _LINEAR) else 4):
            yield GraphLayer(module, weight, layout)


def _node(content: mmap.mmap, start: int, end: int) -> _Node:
    node = _Node()
    for number, first, last in fields(content, start, end):
        if last < 0:
            continue
        if number == _INPUT:
            node.inputs.append(_text(content, first, last))
        elif number == _NAME:
            node.name = _text(content, first, last)
        elif number == _OPERATOR:
            node.operator = _text(content, first, last)
        elif number == _ATTRIBUTE:
            name, value = "", 0
            for kind, begin, stop in fields(content, first, last):
                if kind == _ATTRIBUTE_NAME and stop >= 0:
                    name = _text(content, begin, stop)
                elif kind == _ATTRIBUTE_INTEGER and stop < 0:
                    value = begin
            node.integers[name] = value
    return node


def _weight(content: mmap.mmap, start: int, end: int, graph: Path) -> StoredWeight | None:
    """A weight whose values are in one piece; None if they are not, or if it does not have two or four dimensions."""
    name, dtype, shape, raw, external = "", "", list[int](), None, dict[str, str]()
    for number, first, last in fields(content, start, end):
        if number == _DIMS:
            shape += [first] if last < 0 else list(_packed(content, first, last))
        elif number == _TYPE and last < 0:
            dtype = _DTYPES.get(first, "")
        elif number == _TENSOR_NAME:
            name = _text(content, first, last)
        elif number == _RAW:
            raw = first, last
        elif number == _EXTERNAL:
            pair = {kind: _text(content, begin, stop) for kind, begin, stop in fields(content, first, last)}
            external[pair.get(_KEY, "")] = pair.get(_VALUE, "")
    if len(shape) not in (2, 4) or min(shape) < 1 or not dtype or not name:
        return None
    if "location" in external:
        file = graph.parent / external["location"]
        return StoredWeight(name, dtype, tuple(shape), file, int(external.get("offset", "0")))
    weight = None if raw is None else StoredWeight(name, dtype, tuple(shape), graph, raw[0])
    return weight if weight is not None and raw is not None and weight.nbytes == raw[1] - raw[0] else None


def _packed(content: mmap.mmap, position: int, end: int) -> Iterator[int]:
    while position < end:
        value, position = varint(content, position)
        yield value


def _text(content: mmap.mmap, start: int, end: int) -> str:
    return content[start:end].decode("utf-8", "replace")
