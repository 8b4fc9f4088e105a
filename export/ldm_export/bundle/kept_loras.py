"""Keeps the LoRA adapters of a bundle that is built again."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from ldm_export.bundle.stages import link_files
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import PORTABLE_PRECISION
from ldm_runtime.errors import LdmError, ManifestError
from ldm_runtime.loras.adapter_file import LoraAdapter, read_adapter
from ldm_runtime.loras.changes import changed_part, weight_changes
from ldm_runtime.manifest import LoraFact, Manifest

__all__ = ["with_kept_loras"]

_log = logging.getLogger(__name__)


def with_kept_loras(manifest: Manifest, previous: Bundle | None, work: Path) -> Manifest:
    """Add the adapters of the bundle before to a manifest, and their files to ``work``.

    An adapter that does not fit the new graphs is left out, with a warning.

    Args:
        manifest: The new manifest.
        previous: The bundle before.
        work: Folder with the new graphs.
    """
    if previous is None:
        return manifest
    loras: dict[str, LoraFact] = {}
    for name, lora in previous.manifest.loras.items():
        try:
            _check(read_adapter(name, previous.verified(lora.file)), manifest, work)
        except LdmError as error:
            _log.warning("lora %s: left out of the new bundle, because it does not fit: %s", name, error)
        else:
            loras[name] = lora
    files = link_files([lora.file for lora in loras.values()], work, previous)
    return replace(manifest, loras=loras, files={**manifest.files, **files})


def _check(adapter: LoraAdapter, manifest: Manifest, work: Path) -> None:
    """Raise ManifestError if a layer of an adapter is in no graph, or has another shape there."""
    found = set[tuple[str, str]]()
    for name, component in manifest.components.items():
        part = changed_part(manifest.model, name)
        if part is not None:
            changes = weight_changes(part, [(adapter, 1.0)], work / component.graphs[PORTABLE_PRECISION])
            found |= {(part, change.layer.module) for change in changes}
    if missing := [layer for layer in adapter.pairs if layer not in found]:
        raise ManifestError(f"{adapter.file.path}: {'.'.join(missing[0])}: the new weights have no such layer")
