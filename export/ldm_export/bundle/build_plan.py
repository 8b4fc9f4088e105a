"""Inputs that all stages of a build share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ldm_export.bundle.stages import OnProgress
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.families.family import Family
from ldm_runtime.atomic_files import sha256
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import graph_file
from ldm_runtime.errors import CheckpointError
from ldm_runtime.model import ModelDescription

__all__ = ["BuildPlan", "folder_digests", "relative"]


@dataclass(frozen=True)
class BuildPlan:
    """Inputs and folders of one build.

    Attributes:
        checkpoint: The checkpoint to export.
        family: Family of the checkpoint.
        model: Description of the model. At first it has the traced components, and after the fp32 graphs are written
            those of the bundle.
        work: Folder with the files of finished stages, under their paths in the bundle.
        previous: The existing bundle, if any.
        tools: Package -> version.
        on_progress: Called with the progress of each stage.
        feature_cache: Number of layers of the last up block in the shallow UNet; 0 for no shallow UNet.
    """

    checkpoint: Checkpoint
    family: Family
    model: ModelDescription
    work: Path
    previous: Bundle | None
    tools: Mapping[str, str]
    on_progress: OnProgress
    feature_cache: int = 0

    def graph(self, component: str, precision: str) -> Path:
        """Path of a component's graph in the work folder."""
        return self.work / graph_file(component, precision)

    def fp32_graphs(self) -> dict[str, Path]:
        """Component of the model -> path of its fp32 graph in the work folder."""
        return {name: self.graph(name, "fp32") for name in self.model.components}


def folder_digests(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of every file below a folder of a checkpoint, or of a single file.

    Raises:
        CheckpointError: A file cannot be read.
    """
    try:
        if folder.is_file():
            stat = folder.stat()
            return {folder.name: _file_digest(folder, stat.st_size, stat.st_mtime_ns)}
        return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror}); check the checkpoint") from None


@lru_cache(maxsize=16)
def _file_digest(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file, cached because several components may have their weights in it."""
    return sha256(file)


def relative(files: list[Path], folder: Path) -> list[str]:
    """Paths of files relative to ``folder``, as a stage returns them."""
    return [str(file.relative_to(folder)) for file in files]
