"""In which precision an engine of TensorRT for RTX computes, read from the compiled program inside its bytes.

Opening an engine with the inspector needs a GPU. The bytes hold the program as text, statements like
``corrltn={ name="unet.conv_in/Conv" output={"a"} input={"b" "c"} … layers="[ONNX Layer: unet.conv_in/Conv]" }`` and
``tensor={ … name="b" … type=half }``, so a machine without one can read it too.
"""

from __future__ import annotations

import mmap
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_export.graph.islands import MATRIX
from ldm_runtime.errors import BuildError

TYPES = {"fp32": "float", "fp16": "half", "bf16": "bf16", "int8": "int8"}
_TENSOR = re.compile(rb'tensor=\{[^\n]{0,400}? name="([^"\n]{1,400})"[^\n]{0,400}? type=(\w{1,16}) \}')
_MATRIX = re.compile(
    rb'(?:fully_connected|corrltn|bmm)=\{ name="[^"\n]*" output=\{(?P<out>[^}\n]*)\} input=\{(?P<in>[^}\n]*)\}'
    rb'[^\n]*? layers="(?P<layers>[^"]{0,8000})"'
)
_FUSED = re.compile(
    rb"runtime_fusion=\{ name=__myl_\w*?(?:Fc|Mha|Conv)\w* input_args=\{(?P<in>[^}\n]*)\}"
    rb' output_args=\{(?P<out>[^}\n]*)\}[^\n]*? layers="(?P<layers>[^"]{0,8000})"'
)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_NAME = re.compile(rb'"([^"^]+)(?:\^\w+)?"')


@dataclass(frozen=True)
class Proof:
    """What was read.

    Attributes:
        matrix_work: type ("half", "float", "int8") → convolutions and matrix products that take it, over all profiles.
        beyond: ONNX nodes of matrix work in another type than asked that no island declares.
        read_from: "program", the compiled text inside the engine, or "inspector", which opened it on a GPU.
    """

    matrix_work: Mapping[str, int]
    beyond: tuple[str, ...]
    read_from: str

    def facts(self) -> dict[str, Any]:
        """JSON-able, as the manifest keeps it."""
        return {"read_from": self.read_from, "matrix_work": dict(self.matrix_work)}


def prove(engine: Path, precision: str, islands: Collection[str], *, matrix: bool = True) -> Proof:
    """Read the types of all matrix work in an engine.

    Args:
        engine: the file, of any size.
        precision: what was asked for.
        islands: ONNX nodes that may compute in fp32.
        matrix: False for an engine that has no matrix work at all.

    Raises:
        BuildError: no program can be read from it, or matrix work beyond the islands is in another precision.
    """
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        types = _types(content)
        found = [
            (_kind(match, types), _LAYER.findall(match["layers"].decode()))
            for statement in (_MATRIX, _FUSED)
            for match in statement.finditer(content)
        ]
    if matrix and not found:
        raise BuildError(f"{engine}: no compiled program can be read from it; its precision cannot be proven")
    return checked(engine, found, precision, islands, "program")


def checked(
    engine: Path,
    found: Sequence[tuple[str, Sequence[str]]],
    precision: str,
    islands: Collection[str],
    read_from: str,
) -> Proof:
    """Count matrix work by type and compare it with what was asked.

    Args:
        found: of each operation its type, and the ONNX nodes it was made of.

    Raises:
        BuildError: work beyond the islands is in another precision.
    """
    wanted = TYPES[precision]
    counts = Counter(kind for kind, _ in found)
    beyond: list[str] = []
    for kind, nodes in found:
        if kind != wanted:
            beyond += [node for node in matrix_nodes(nodes) or ["a fused operation"] if node not in islands]
    proof = Proof(dict(sorted(counts.items())), tuple(dict.fromkeys(beyond)), read_from)
    if beyond:
        raise BuildError(
            f"{engine}: {len(proof.beyond)} matrix operations are in {_others(counts, wanted)}, expected {precision}, "
            f"first {proof.beyond[0]}; report it with the graph"
        )
    return proof


def matrix_nodes(nodes: Sequence[str]) -> list[str]:
    """Those of these ONNX nodes that are convolutions or matrix products, by the names that exports give them."""
    return [node for node in nodes if node.rpartition("/")[2].partition("_")[0] in MATRIX]


def _types(content: mmap.mmap) -> dict[str, list[tuple[int, str]]]:
    """Tensor name → (where it is declared, its type), in rising order: each profile's program declares its own."""
    types: dict[str, list[tuple[int, str]]] = {}
    for match in _TENSOR.finditer(content):
        types.setdefault(match[1].decode(), []).append((match.start(), match[2].decode()))
    return types


def _kind(statement: re.Match[bytes], types: Mapping[str, list[tuple[int, str]]]) -> str:
    """The type of the first two operands, data and weights, or, where both are references without one, of the result.

    A tensor's type is that declared last before the statement.
    """

    def declared(names: list[bytes]) -> set[str]:
        found = set()
        for name in names:
            places = types.get(name.decode(), [])
            if index := bisect_left(places, (statement.start(), "")):
                found.add(places[index - 1][1])
        return found

    kinds = declared(_NAME.findall(statement["in"])[:2]) or declared(_NAME.findall(statement["out"])[:1])
    return "/".join(sorted(kinds)) or "unknown"


def _others(counts: Counter[str], wanted: str) -> str:
    return ", ".join(kind for kind in counts if kind != wanted)
