"""Stages that write the shallow graphs of the UNet, one for each of its graphs. They share its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ldm_export.bundle.stages import Stage
from ldm_export.bundle.variant_stages import Variant
from ldm_export.graph.component_split import graph_spec
from ldm_export.graph.passes.deep_features import shallow_unet
from ldm_runtime.bundle_layout import graph_file
from ldm_runtime.model import DEEP_FEATURES, SHALLOW_UNET, UNET, ModelDescription
from ldm_runtime.specs import Axis, ComponentSpec

__all__ = ["has_deep_features", "shallow_stages", "shallow_variants", "with_shallow_unet"]

FORM = 1
"""Version of the shallow graphs. Increase it when the shallow graph of the same UNet graph changes."""


def has_deep_features(model: ModelDescription) -> bool:
    """True if the model's UNet returns deep features, so that its graphs have shallow graphs."""
    return any(tensor.name == DEEP_FEATURES for tensor in model.components[UNET].outputs)


def shallow_stages(work: Path, sources: Mapping[str, str], precisions: Sequence[str]) -> list[Stage]:
    """Return a stage for each portable graph of the UNet.

    Args:
        work: Folder of the finished stages, which contains the UNet's graphs.
        sources: Graph file -> key of the stage that wrote it.
        precisions: Precisions of the build. Those in which the UNet has no graph are skipped.
    """
    return [_stage(work, sources, one, "") for one in precisions if graph_file(UNET, one) in sources]


def shallow_variants(work: Path, sources: Mapping[str, str], variants: Sequence[Variant]) -> list[Variant]:
    """Return a shallow variant for each variant of the UNet."""
    return [
        Variant(SHALLOW_UNET, one.precision, one.engine, _stage(work, sources, one.precision, one.engine))
        for one in variants
        if one.component == UNET and one.file in sources
    ]


def _stage(work: Path, sources: Mapping[str, str], precision: str, variant: str) -> Stage:
    source, target = graph_file(UNET, precision, variant), graph_file(SHALLOW_UNET, precision, variant)

    def run(folder: Path) -> list[str]:
        (folder / target).parent.mkdir()
        ir.save(
            shallow_unet(ir.load(work / source)), folder / target
        )  # refers to external weights instead of copying them
        return [target]

    name = ".".join(filter(None, (SHALLOW_UNET, precision, variant)))
    return Stage(name, {"graph": sources[source], "form": FORM}, run)


def with_shallow_unet(model: ModelDescription, work: Path) -> ModelDescription:
    """Insert the shallow UNet into a model after the UNet. Its fp32 graph is in the folder ``work``."""
    unet = model.components[UNET]
    axes = {dim.name: dim for tensor in unet.inputs for dim in tensor.shape if isinstance(dim, Axis)}
    shallow = graph_spec(work / graph_file(SHALLOW_UNET, "fp32"), SHALLOW_UNET, unet.runs, axes)
    components: dict[str, ComponentSpec] = {}
    for name, spec in model.components.items():
        components[name] = spec
        if name == UNET:
            components[SHALLOW_UNET] = shallow
    return replace(model, components=components)
