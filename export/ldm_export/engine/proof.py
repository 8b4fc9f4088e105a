"""Proves the precision of a TensorRT for RTX engine from the compiled program in its bytes, without a GPU.

The inspector needs a GPU to open an engine. The bytes of the engine contain its program as text, in statements like
``corrltn={ name="unet.conv_in/Conv" output={"a"} input={"b" "c"} … layers="[ONNX Layer: unet.conv_in/Conv]" }`` and
``tensor={ … name="b" … type=half }``, so a machine without a GPU can read it.
"""

from __future__ import annotations

import mmap
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ldm_export.engine.attention import FusedAttention, fused_attention
from ldm_export.graph.islands import MATRIX
from ldm_runtime.errors import BuildError

__all__ = ["NO_MATRIX_WORK", "Proof", "checked", "has_matrix_work", "matrix_nodes", "prove"]

TYPES = {"fp32": "float", "fp16": "half", "bf16": "bf16", "int8": "int8"}
LAYERS = rb'layers="(?P<layers>[^"\n]{0,1000000})"'
"""The ONNX nodes of a statement. All 140 keys and values of Stable Diffusion XL are one product: a list of 12 kB."""
_TENSOR = re.compile(rb'tensor=\{[^\n]{0,400}? name="([^"\n]{1,400})"[^\n]{0,400}? type=(\w{1,16}) \}')
_MATRIX = re.compile(
    rb'(?:fully_connected|corrltn|bmm)=\{ name="[^"\n]*" output=\{(?P<out>[^}\n]*)\} input=\{(?P<in>[^}\n]*)\}'
    rb"[^\n]*? " + LAYERS
)
_FUSED = re.compile(
    rb"runtime_fusion=\{ name=__myl_\w*?(?:Fc|Mha|Conv)\w* input_args=\{(?P<in>[^}\n]*)\}"
    rb" output_args=\{(?P<out>[^}\n]*)\}[^\n]*? " + LAYERS
)
_ATTENTION = re.compile(
    rb"function=\{ name=_gemm_mha\w* [^\n]*? input_args=\{(?P<in>[^}\n]*)\}[^\n]*? output_args=\{(?P<out>[^}\n]*)\}"
    rb"[^\n]*? " + LAYERS
)
_KERNEL = re.compile(rb"function=\{ name=(\w{1,400}) [^\n]*? " + LAYERS)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_NAME = re.compile(rb'"([^"^]+)(?:\^\w+)?"')


@dataclass(frozen=True)
class Proof:
    """The types of an engine's matrix operations.

    Attributes:
        matrix_work: Type ("half", "float", "int8") -> number of convolutions, matrix products and fused attentions of
            that type, over all profiles.
        beyond: ONNX nodes of matrix operations that have another type than requested, except the islands.
        read_from: Source of the proof: "program", the compiled text inside the engine; "inspector", which opened it on
            a GPU; or "graph", if the graph has no matrix operations.
        attention: The attentions of the graph and which of them are fused; None if it has none.
    """

    matrix_work: Mapping[str, int]
    beyond: tuple[str, ...]
    read_from: str
    attention: FusedAttention | None = None

    def facts(self) -> dict[str, Any]:
        """Return the manifest's entry as JSON values."""
        attention = {} if self.attention is None else {"attention": self.attention.facts()}
        return {"read_from": self.read_from, "matrix_work": dict(self.matrix_work), **attention}


NO_MATRIX_WORK = Proof({}, (), "graph")
"""Proof of an engine whose graph has no matrix operations."""


def has_matrix_work(graph: Path) -> bool:
    """True if a graph has convolutions or matrix products, whose precision must be proven."""
    return any(node.op_type in MATRIX for node in ir.load(graph).graph.all_nodes())


def prove(engine: Path, precision: str, islands: Collection[str], attentions: Sequence[str] = ()) -> Proof:
    """Read the types of all matrix operations in an engine and which attentions are fused. The graph must have some.

    Args:
        engine: File of any size.
        precision: The requested precision.
        islands: ONNX nodes that may compute in fp32.
        attentions: Attentions of the graph, as ``attention.attentions_of`` returns them.

    Raises:
        BuildError: No program can be read from the file, or matrix operations outside the islands are in another
            precision.
    """
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        types = _types(content)
        operations = [
            (_kind(match, types), _LAYER.findall(match["layers"].decode()))
            for statement in (_MATRIX, _FUSED, _ATTENTION)
            for match in statement.finditer(content)
        ]
        kernels = [(match[1].decode(), _LAYER.findall(match[2].decode())) for match in _KERNEL.finditer(content)]
    if not operations:
        raise BuildError(f"{engine}: no compiled program can be read from it; its precision cannot be proven")
    proof = checked(engine, operations, precision, islands, "program")
    return replace(proof, attention=fused_attention(attentions, kernels)) if attentions else proof


def checked(
    engine: Path,
    operations: Sequence[tuple[str, Sequence[str]]],
    precision: str,
    islands: Collection[str],
    read_from: str,
) -> Proof:
    """Count matrix operations by type and compare the types with the requested precision.

    Args:
        engine: File of the engine, for messages.
        operations: (type, ONNX nodes from which it was built) of each operation.
        precision: The requested precision.
        islands: ONNX nodes that may compute in fp32.
        read_from: See ``Proof``.

    Raises:
        BuildError: Operations outside the islands are in another precision.
    """
    expected = TYPES[precision]
    counts = Counter(kind for kind, _ in operations)
    beyond: list[str] = []
    for kind, nodes in operations:
        if kind != expected:
            beyond += [node for node in matrix_nodes(nodes) or ["a fused operation"] if node not in islands]
    proof = Proof(dict(sorted(counts.items())), tuple(dict.fromkeys(beyond)), read_from)
    if beyond:
        raise BuildError(
            f"{engine}: {len(proof.beyond)} matrix operations are in {_others(counts, expected)}, expected "
            f"{precision}, first {proof.beyond[0]}; report it with the graph"
        )
    return proof


def matrix_nodes(nodes: Sequence[str]) -> list[str]:
    """Return the ONNX nodes that are convolutions or matrix products, by the names that the exporter gives them."""
    return [node for node in nodes if node.rpartition("/")[2].partition("_")[0] in MATRIX]


def _types(content: mmap.mmap) -> dict[str, list[tuple[int, str]]]:
    """Tensor name -> (offset of a declaration, type), ascending; the program of each profile declares tensors."""
    types: dict[str, list[tuple[int, str]]] = {}
    for match in _TENSOR.finditer(content):
        types.setdefault(match[1].decode(), []).append((match.start(), match[2].decode()))
    return types


def _kind(statement: re.Match[bytes], types: Mapping[str, list[tuple[int, str]]]) -> str:
    """Return the type of the first two operands, data and weights; or of the result, if both operands have none.

    A tensor has the type that was declared last before the statement.
    """

    def declared(names: list[bytes]) -> set[str]:
        kinds = set()
        for name in names:
            places = types.get(name.decode(), [])
            if index := bisect_left(places, (statement.start(), "")):
                kinds.add(places[index - 1][1])
        return kinds

    kinds = declared(_NAME.findall(statement["in"])[:2]) or declared(_NAME.findall(statement["out"])[:1])
    return "/".join(sorted(kinds)) or "unknown"


def _others(counts: Counter[str], expected: str) -> str:
    return ", ".join(kind for kind in counts if kind != expected)
