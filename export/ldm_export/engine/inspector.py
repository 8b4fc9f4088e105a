"""In which precision an engine computes, read with the inspector of TensorRT, which opens it on a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm_export.engine.proof import Proof, checked, matrix_nodes
from ldm_runtime.errors import BuildError

_KINDS = (
    ("bfloat", "bf16"),
    ("bf16", "bf16"),
    ("half", "half"),
    ("fp16", "half"),
    ("int8", "int8"),
    ("fp8", "fp8"),
    ("float", "float"),
    ("fp32", "float"),
)
UNKNOWN = "unknown"
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def inspect_engine(
    package: ModuleType, engine: Path, precision: str, islands: Collection[str], *, matrix: bool = True
) -> Proof:
    """Open an engine, built with detailed profiling verbosity, and read the types of all its matrix work.

    Arguments are those of ``proof.prove``.

    Raises:
        BuildError: it does not open, or matrix work beyond the islands is in another precision.
    """
    runtime = package.Runtime(package.Logger(package.Logger.ERROR))
    opened = runtime.deserialize_cuda_engine(engine.read_bytes())
    if opened is None:
        raise BuildError(f"{engine}: {package.__name__} cannot open what it built; check the GPU's memory and driver")
    text = opened.create_engine_inspector().get_engine_information(package.LayerInformationFormat.JSON)
    found = layer_work(json.loads(text))
    if matrix and all(kind == UNKNOWN for kind, _ in found):
        raise BuildError(f"{engine}: the inspector tells no type of its matrix work; its precision cannot be proven")
    proof = checked(engine, [one for one in found if one[0] != UNKNOWN], precision, islands, "inspector")
    return replace(proof, matrix_work={**proof.matrix_work, **_unknown(found)})


def layer_work(information: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Of each layer with matrix work its type and the ONNX nodes it was made of.

    A layer's type is that of its weights, else that of its inputs: with dynamic shapes TensorRT tells no input's.

    Args:
        information: what the inspector gives as JSON.

    Raises:
        BuildError: it tells of layers no more than their names.
    """
    found = []
    for layer in information.get("Layers", ()):
        if not isinstance(layer, Mapping):
            raise BuildError("the inspector tells names of layers alone; build with detailed profiling verbosity")
        if nodes := matrix_nodes(_ONNX.findall(str(layer.get("Metadata", "")))):
            weights = layer.get("Weights")
            given = [weights] if isinstance(weights, Mapping) else [*layer.get("Inputs", ())][:2]
            kinds = {_type(tensor) for tensor in given} - {UNKNOWN}
            found.append(("/".join(sorted(kinds)) or UNKNOWN, nodes))
    return found


def _unknown(found: list[tuple[str, list[str]]]) -> dict[str, int]:
    count = sum(kind == UNKNOWN for kind, _ in found)
    return {UNKNOWN: count} if count else {}


def _type(tensor: Mapping[str, Any]) -> str:
    """Find the type ("half", "float", …) in a text like "Channel major FP16 format where channel % 8 == 0"."""
    text = str(tensor.get("Type", tensor.get("Format/Datatype", ""))).lower()
    return next((kind for said, kind in _KINDS if said in text), UNKNOWN)
