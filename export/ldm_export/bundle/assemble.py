"""Assembles the files of a finished build into a bundle."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from ldm_export.bundle.publish import publish
from ldm_export.bundle.stages import Outcome
from ldm_runtime.atomic_files import write_whole
from ldm_runtime.bundle_layout import BUILD_LOG, MANIFEST
from ldm_runtime.manifest import Manifest

__all__ = ["assemble"]


def assemble(work: Path, target: Path, manifest: Manifest, outcomes: Mapping[str, Outcome]) -> None:
    """Replace the bundle at ``target`` by the files of the manifest in ``work``, and remove ``work``."""
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    for name in manifest.files:
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).rename(finished / name)
    write_whole(finished / MANIFEST, manifest.to_json().encode())
    log = {
        "host": platform.platform(),
        "python": platform.python_version(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stages": {name: {"seconds": round(o.seconds, 3), "origin": o.origin} for name, o in outcomes.items()},
    }
    write_whole(finished / BUILD_LOG, (json.dumps(log, indent=2) + "\n").encode())
    publish(finished, target)
    shutil.rmtree(work)
