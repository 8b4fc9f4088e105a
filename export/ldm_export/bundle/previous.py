"""The bundle that a build finds in its place."""

from __future__ import annotations

import json
from pathlib import Path

from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import BuildError, ManifestError
from ldm_runtime.manifest import FORMAT, Manifest

__all__ = ["describes", "previous_bundle"]


def previous_bundle(target: Path) -> Bundle | None:
    """The bundle at ``target``; None if there is none, or one that is damaged or of another version.

    Raises:
        BuildError: The folder has other files.
    """
    if not target.exists():
        return None
    if not target.is_dir() or (any(target.iterdir()) and not _has_manifest(target)):
        raise BuildError(f"{target}: exists and is no bundle; choose another -o or remove it, nothing was changed")
    try:
        return Bundle.open(target)
    except ManifestError:
        return None  # damaged, or of another version: build all of it


def _has_manifest(folder: Path) -> bool:
    """True for a bundle's manifest, whole or damaged: other programs have a manifest.json too."""
    manifest = folder / MANIFEST
    return manifest.is_file() and json.dumps(FORMAT).encode() in manifest.read_bytes()


def describes(previous: Bundle, manifest: Manifest) -> bool:
    """True where the previous bundle says what this build would, with reports and measurements added at most."""
    before = previous.manifest
    try:
        for name in before.files.keys() - manifest.files.keys():
            previous.file(name)
    except ManifestError:
        return False  # a damaged report: leave the reports out
    return (before.stages, before.components, before.request, before.model) == (
        manifest.stages,
        manifest.components,
        manifest.request,
        manifest.model,
    )
