"""Reads the precision and the fused attentions of an engine with TensorRT's inspector. This needs a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ldm_export.engine.attention import fused_attention
from ldm_export.engine.proof import Proof, checked, matrix_nodes
from ldm_runtime.errors import BuildError

__all__ = ["inspect_engine", "layer_nodes", "layer_work"]

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
"""(Part of the inspector's name of a type, name in the manifest) pairs. The first match is used."""
UNKNOWN = "unknown"
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def inspect_engine(
    package: ModuleType, engine: Path, precision: str, islands: Collection[str], attentions: Sequence[str] = ()
) -> Proof:
    """Open an engine that was built with detailed profiling verbosity, and read the types of its matrix operations.

    Arguments are those of ``proof.prove``.

    Raises:
        BuildError: The engine cannot be opened, no type can be read, or matrix operations outside the islands are in
            another precision.
    """
    runtime = package.Runtime(package.Logger(package.Logger.ERROR))
    opened = runtime.deserialize_cuda_engine(engine.read_bytes())
    if opened is None:
        raise BuildError(f"{engine}: {package.__name__} cannot open what it built; check the GPU's memory and driver")
    text = opened.create_engine_inspector().get_engine_information(package.LayerInformationFormat.JSON)
    information = json.loads(text)
    layers = layer_work(information)
    if all(kind == UNKNOWN for kind, _ in layers):
        raise BuildError(f"{engine}: the inspector reports no type of its matrix work; its precision cannot be proven")
    proof = checked(engine, [layer for layer in layers if layer[0] != UNKNOWN], precision, islands, "inspector")
    attention = fused_attention(attentions, layer_nodes(information)) if attentions else None
    return replace(proof, matrix_work={**proof.matrix_work, **_unknown(layers)}, attention=attention)


def layer_work(information: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return (type, ONNX nodes from which it was built) of each layer with matrix operations.

    A layer's type is that of its weights, or of its inputs if it has no weights. With dynamic shapes, TensorRT does not
    report types of inputs.

    Args:
        information: The inspector's JSON.

    Raises:
        BuildError: The inspector reports only the names of layers.
    """
    work = []
    for layer in information.get("Layers", ()):
        if not isinstance(layer, Mapping):
            raise BuildError("the inspector reports only names of layers; build with detailed profiling verbosity")
        if nodes := matrix_nodes(_ONNX.findall(str(layer.get("Metadata", "")))):
            weights = layer.get("Weights")
            operands = [weights] if isinstance(weights, Mapping) else [*layer.get("Inputs", ())][:2]
            kinds = {_type(tensor) for tensor in operands} - {UNKNOWN}
            work.append(("/".join(sorted(kinds)) or UNKNOWN, nodes))
    return work


def layer_nodes(information: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return (name, ONNX nodes from which it was built) of each layer in the inspector's JSON."""
    layers = [layer for layer in information.get("Layers", ()) if isinstance(layer, Mapping)]
    return [(str(layer.get("Name", "")), _ONNX.findall(str(layer.get("Metadata", "")))) for layer in layers]


def _unknown(layers: list[tuple[str, list[str]]]) -> dict[str, int]:
    count = sum(kind == UNKNOWN for kind, _ in layers)
    return {UNKNOWN: count} if count else {}


def _type(tensor: Mapping[str, Any]) -> str:
    """Return "half", "float", … for a text like "Half" or "Channel major FP16 format where channel % 8 == 0"."""
    text = str(tensor.get("Type", tensor.get("Format/Datatype", ""))).lower()
    return next((kind for part, kind in _KINDS if part in text), UNKNOWN)
