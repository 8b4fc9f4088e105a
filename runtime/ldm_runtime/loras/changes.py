"""The weights of a graph that selected adapters change, and their new values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import ManifestError
from ldm_runtime.loras.adapter_file import LoraAdapter, LowRankPair
from ldm_runtime.loras.graph_layers import GraphLayer, StoredWeight, graph_layers
from ldm_runtime.model import DENOISERS, ModelDescription
from ldm_runtime.verified_file import GraphFile, path_of

__all__ = ["ChangedWeight", "Scaled", "changed_part", "weight_changes"]

UNET_PART, TEXT_PARTS = "unet", ("text_encoder", "text_encoder_2")
Scaled = tuple[LoraAdapter, float]
"""An adapter and the weight of its changes."""


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """A weight of a graph and the changes of it.

    Attributes:
        layer: The layer in the graph.
        changes: Pairs of factors, and the weight of each.
        adapters: The adapters of the pairs.
    """

    layer: GraphLayer
    changes: tuple[tuple[LowRankPair, float], ...]
    adapters: tuple[LoraAdapter, ...]

    @property
    def stored(self) -> StoredWeight:
        """The weight without the changes."""
        return self.layer.weight

    def values(self) -> NDArray[np.floating]:
        """Compute the changed weight as the graph stores it: in float32, then rounded to the graph's dtype.

        Raises:
            ManifestError: The file of an adapter was written meanwhile.
        """
        total = self.stored.read().astype(np.float32)
        for pair, weight in self.changes:
            total += self.layer.stored(pair.change(weight))
        for adapter in self.adapters:
            adapter.file.check_not_written()
        return np.ascontiguousarray(total.astype(self.stored.dtype))


def changed_part(model: ModelDescription, component: str) -> str | None:
    """The part of the checkpoint that a component was made of, if adapters can change it; None otherwise."""
    derived = {spec.name for runs in ("request", "schedule") for spec in model.once_per(runs)}
    if component in DENOISERS or component in derived:
        return UNET_PART
    return component if component in TEXT_PARTS else None


def weight_changes(part: str, selected: Sequence[Scaled], graph: GraphFile) -> list[ChangedWeight]:
    """The weights of a graph that adapters change.

    Args:
        part: Part of the checkpoint that the graph was made of.
        selected: Adapters and their weights.
        graph: The graph. Its nodes are read, and none of its weights.

    Raises:
        ManifestError: A factor does not fit its weight, or layers that are changed differently share one.
    """
    path = path_of(graph)
    layers = sorted(graph_layers(path), key=_initializer)
    found = [_changed(path, part, selected, list(same)) for _, same in groupby(layers, _initializer)]
    return [one for one in found if one is not None]


def _initializer(layer: GraphLayer) -> str:
    return layer.weight.name


def _changed(path: Path, part: str, selected: Sequence[Scaled], layers: Sequence[GraphLayer]) -> ChangedWeight | None:
    """The changes of one weight, which layers of several modules may share if their weights are equal."""
    modules = list(dict.fromkeys(layer.module for layer in layers))
    changing = [
        (adapter, adapter.pairs[part, module], weight)
        for module in modules
        for adapter, weight in selected
        if (part, module) in adapter.pairs
    ]
    if not changing:
        return None
    if len(modules) > 1:
        raise ManifestError(
            f"{path}: {modules[0]} and {modules[1]} have equal weights and share them, so adapter "
            f"{changing[0][0].name} cannot change one of them; merge it with `ldm-export build --lora`"
        )
    layer = layers[0]
    for adapter, pair, _ in changing:
        if not pair.fits(layer.shape):
            raise ManifestError(
                f"{adapter.file.path}: {modules[0]}: got factors {list(pair.down.shape)} and {list(pair.up.shape)} for "
                f"weights {list(layer.shape)}; add the adapter again"
            )
    pairs = tuple((pair, weight) for _, pair, weight in changing)
    return ChangedWeight(layer, pairs, tuple(adapter for adapter, _, _ in changing))
