"""Lists the files of external data that an ONNX graph refers to, without the package onnx.

An engine opens these files itself, so their digests must be checked before. The graph is untrusted: its protobuf wire
format (https://protobuf.dev/programming-guides/encoding) is read message by message, without recursion. Field numbers
are those of onnx.proto.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from ldm_runtime.errors import ManifestError
from ldm_runtime.protobuf_fields import varint

__all__ = ["external_locations"]

MAX_FIELDS = 10_000_000
"""Maximum number of fields of a graph; the largest graphs of diffusion models have less than a million."""
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_KEY, _VALUE = 1, 2
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "StringStringEntry"},
    "StringStringEntry": {},
}
"""Message -> field number -> type of the message in that field, for all paths to a tensor's ``external_data``."""


def external_locations(graph: Path) -> set[str]:
    """The "location" of the external data of every tensor in a graph, its subgraphs and its functions.

    Args:
        graph: An ONNX file.

    Returns:
        Paths as written in the graph. Valid ones are relative to its folder. Empty if all data is in the graph.

    Raises:
        ManifestError: The file is not a protobuf message, or has too many fields.
        OSError: It cannot be read.
    """
    with graph.open("rb") as file:
        if not graph.stat().st_size:
            raise ManifestError(f"{graph}: empty, expected an ONNX graph; rebuild the bundle")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"location") < 0:
                return set()
            try:
                return _locations(content)
            except (ValueError, IndexError) as error:
                raise ManifestError(f"{graph}: no ONNX graph ({error}); rebuild the bundle") from None


def _locations(content: mmap.mmap) -> set[str]:
    locations: set[str] = set()
    fields_left = MAX_FIELDS
    messages = [("Model", 0, len(content))]
    while messages:
        kind, position, end = messages.pop()
        children = _CHILDREN[kind]
        texts: dict[int, list[str]] = {_KEY: [], _VALUE: []}
        while position < end:
            fields_left -= 1
            if not fields_left:
                raise ValueError(f"more than {MAX_FIELDS} fields")
            tag, position = varint(content, position)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == _LENGTH:
                size, start = varint(content, position)
                position = start + size
                if position > end:
                    raise ValueError(f"a field of {size} bytes goes beyond its message")
                if number in children:
                    messages.append((children[number], start, position))
                elif kind == "StringStringEntry" and number in texts:
                    texts[number].append(content[start:position].decode("utf-8", "replace"))
            elif wire_type == _VARINT:
                _, position = varint(content, position)
            elif wire_type in (_FIXED64, _FIXED32):
                position += 8 if wire_type == _FIXED64 else 4
            else:
                raise ValueError(f"wire type {wire_type}")
        if position != end:
            raise ValueError("a field goes beyond its message")
        if "location" in texts[_KEY]:
            locations.update(texts[_VALUE])
    return locations
