"""Pipeline families, one module each. A family is recognised by the class name in a checkpoint's model_index.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_export.checkpoint.folder import INDEX, Checkpoint, read_folder, read_index
from ldm_export.families.class_conditional import CLASS_CONDITIONAL
from ldm_export.families.family import BundleFile, Family, TracedComponent
from ldm_export.families.inpainting import INPAINTING
from ldm_export.families.layout_to_image import LAYOUT_TO_IMAGE
from ldm_export.families.other_pipelines import pipeline_kind
from ldm_export.families.semantic_synthesis import SEMANTIC_SYNTHESIS
from ldm_export.families.stable_diffusion import STABLE_DIFFUSION
from ldm_export.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from ldm_export.families.super_resolution import SUPER_RESOLUTION
from ldm_export.families.text_to_image import TEXT_TO_IMAGE
from ldm_export.families.unconditional import UNCONDITIONAL
from ldm_runtime.errors import CheckpointError

__all__ = [
    "FAMILIES",
    "BundleFile",
    "Family",
    "TracedComponent",
    "family_named",
    "family_of",
    "open_checkpoint",
]

FAMILIES: tuple[Family, ...] = (
    TEXT_TO_IMAGE,
    STABLE_DIFFUSION,
    STABLE_DIFFUSION_XL,
    UNCONDITIONAL,
    CLASS_CONDITIONAL,
    SUPER_RESOLUTION,
    INPAINTING,
    SEMANTIC_SYNTHESIS,
    LAYOUT_TO_IMAGE,
)
"""Every family that can be exported."""


def family_of(index: Mapping[str, Any]) -> Family:
    """Return the family of a checkpoint.

    Args:
        index: Content of model_index.json.

    Raises:
        CheckpointError: No family has this pipeline class; the message lists those that are supported.
    """
    name = index.get("_class_name")
    for family in FAMILIES:
        if isinstance(name, str) and name in family.pipelines:
            return family
    supported = ", ".join(family.pipelines[0] for family in FAMILIES if family.pipelines)
    what = f" ({known})" if isinstance(name, str) and (known := pipeline_kind(name)) else ""
    raise CheckpointError(f"{INDEX} is of a {name!r:.80}{what}, expected {supported}; use such a checkpoint")


def family_named(name: str) -> Family:
    """Return the family that a bundle's manifest names.

    Raises:
        CheckpointError: There is no family with that name.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"family: got {name!r:.80}, expected one of {known}; install a newer ldm-export")


def open_checkpoint(folder: Path, *, random_weights: bool = False, seed: int = 0) -> Checkpoint:
    """Read and check a checkpoint's configs. With ``random_weights``, no weight files are needed.

    Args:
        folder: A diffusers folder with model_index.json.
        random_weights: True draws random weights instead of reading them.
        seed: Seed of the random weights.

    Raises:
        CheckpointError: The folder is not a checkpoint, a pipeline or class is not supported, a folder or file is
            missing, or a config is damaged, has values of a wrong type or size, or does not fit the other parts.
    """
    folder = Path(folder)
    index = read_index(folder)
    try:
        family = family_of(index)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return read_folder(folder, index, family.name, family.layout, seed if random_weights else None)
