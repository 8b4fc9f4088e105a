"""The bundle that exists at the target of a build."""

from __future__ import annotations

import json
from pathlib import Path

from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import BuildError, ManifestError
from ldm_runtime.manifest import FORMAT, Manifest
from ldm_runtime.manifest_reader import MAX_BYTES
from ldm_runtime.regular_files import read_regular

__all__ = ["describes", "previous_bundle"]


def previous_bundle(target: Path) -> Bundle | None:
    """Open the bundle at ``target``; None if there is none, or if it is damaged or has another version.

    Raises:
        BuildError: The folder exists and is not a bundle.
    """
    if not target.exists():
        return None
    if not target.is_dir() or (any(target.iterdir()) and not _has_manifest(target)):
        raise BuildError(f"{target}: exists and is not a bundle; choose another -o or remove it, nothing was changed")
    try:
        return Bundle.open(target)
    except ManifestError:
        return None  # damaged, or of another version: build everything


def _has_manifest(folder: Path) -> bool:
    """True if the folder has a bundle's manifest, even a damaged one. Other programs also write a manifest.json."""
    manifest = folder / MANIFEST
    try:
        return json.dumps(FORMAT).encode() in read_regular(manifest, MAX_BYTES, ManifestError)
    except ManifestError:
        return False


def describes(previous: Bundle, manifest: Manifest) -> bool:
    """True if the previous bundle equals this build, except for added reports and measurements."""
    before = previous.manifest
    try:
        for name in before.files.keys() - manifest.files.keys():
            previous.file(name)
    except ManifestError:
        return False  # a damaged report: write the bundle without reports
    return (before.stages, before.components, before.request, before.model) == (
        manifest.stages,
        manifest.components,
        manifest.request,
        manifest.model,
    )
