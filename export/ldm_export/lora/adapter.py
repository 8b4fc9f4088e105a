"""Makes the adapter of a bundle from a LoRA file: its factors under the names of the modules in the bundle's graphs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from ldm_export.lora.lora_file import LowRank, read_lora
from ldm_export.lora.matching import match_layers, refusal
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import PORTABLE_PRECISION
from ldm_runtime.errors import BuildError, CheckpointError
from ldm_runtime.loras.adapter_file import DOWN, UP
from ldm_runtime.loras.changes import changed_part
from ldm_runtime.loras.graph_layers import graph_layers

__all__ = ["Adapter", "adapter_of"]

_TEXT_LAYER = re.compile(r"encoder[._]layers[._](\d+)[._]")
_FIRST_BLOCKS = re.compile(r"down_blocks\.0\.resnets\.(\d+)\.")

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter -> its shape."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that can be written into a bundle.

    Attributes:
        content: A safetensors file as ``ldm_runtime.loras.adapter_file`` reads it.
        layers: Part -> number of its layers that change.
        left_out: Number of layers after the last one that a text encoder of the bundle computes; they have no effect.
    """

    content: bytes
    layers: Mapping[str, int]
    left_out: int


def adapter_of(bundle: Bundle, file: Path) -> Adapter:
    """Read a LoRA file and check that all its layers fit a bundle.

    Raises:
        CheckpointError: The file cannot be read, or a layer does not fit the bundle.
        BuildError: The bundle has no fp32 graphs.
        ManifestError: A graph is damaged.
    """
    layers, parts = read_lora(file), _parts(bundle)
    factors: dict[str, NDArray[np.floating]] = {}
    counts, left_out = Counter[str](), 0
    for part in dict.fromkeys(layer.part for layer in layers):
        own = [layer for layer in layers if layer.part == part]
        if part not in parts:
            raise CheckpointError(refusal(file, own, len(layers), f"the bundle has no {part}"))
        last = _last_text_layer(parts[part])
        computed = [layer for layer in own if last is None or _text_layer(layer.module) <= last]
        left_out += len(own) - len(computed)
        for key, layer in match_layers(file, computed, parts[part], _res_blocks(parts[part]), len(layers)).items():
            module = f"{part}.{key.removesuffix('.weight')}"
            factors[f"{module}.{DOWN}"], factors[f"{module}.{UP}"] = _factors(layer)
            counts[part] += 1
    if not factors:
        raise CheckpointError(refusal(file, layers, len(layers), "the bundle computes none of these layers"))
    return Adapter(save(factors, {"format": "pt"}), dict(counts), left_out)


def _parts(bundle: Bundle) -> Mapping[str, Shapes]:
    """Part of the checkpoint -> the weights of its layers in the bundle's graphs."""
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, component in bundle.manifest.components.items():
        part = changed_part(bundle.manifest.model, name)
        if part is None:
            continue
        if PORTABLE_PRECISION not in component.graphs:
            raise BuildError(
                f"{bundle.folder}: has no {PORTABLE_PRECISION} graph of {name}; rebuild it to add an adapter"
            )
        found = graph_layers(bundle.graph(name, PORTABLE_PRECISION))
        parts.setdefault(part, {}).update({f"{layer.module}.weight": layer.shape for layer in found})
    return parts


def _text_layer(module: str) -> int:
    """Number of the layer of a text encoder that a module belongs to; -1 outside of them."""
    match = _TEXT_LAYER.match(module.removeprefix("text_model."))
    return -1 if match is None else int(match[1])


def _last_text_layer(shapes: Shapes) -> int | None:
    """Number of the last layer of a text encoder that the graphs compute; None for another part."""
    last = max(map(_text_layer, shapes), default=-1)
    return None if last < 0 else last


def _res_blocks(shapes: Shapes) -> int:
    """Residual blocks of a level of the UNet; 1 for another part."""
    return max((int(match[1]) + 1 for key in shapes if (match := _FIRST_BLOCKS.match(key))), default=1)


def _factors(layer: LowRank) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Down and up, which includes alpha / rank; float16 where that loses nothing."""
    return _smallest(layer.down.read()), _smallest(layer.factor * layer.up.read())


def _smallest(factor: torch.Tensor) -> NDArray[np.floating]:
    half = factor.half()
    array: NDArray[np.floating] = (half if torch.equal(half.float(), factor) else factor).numpy()
    return array
