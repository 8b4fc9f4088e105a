"""Writes models into a Triton model repository. Files are linked; a new version appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ldm_export.bundle.publish import remove, work_folder
from ldm_export.serving.models import Model
from ldm_export.serving.pbtxt import to_pbtxt
from ldm_runtime.atomic_files import write_whole
from ldm_runtime.errors import BuildError

__all__ = ["model_versions", "write_models"]

CONFIG = "config.pbtxt"
HEADER = "# Written by ldm-export triton, which replaces it with each version.\n"
MAX_VERSIONS = 2
"""Number of versions of a model that are kept: the new one, and the previous one, which a server may still run."""


def write_models(repository: Path, models: Sequence[Model]) -> int:
    """Add a version of each model, in order. Other models of the repository are not changed.

    All files are prepared on the same disk before the first model is changed. Each version then appears by one rename,
    and its config by another. A server loads the version on request, or when it polls the repository.

    Args:
        repository: Folder of the models; created if it does not exist.
        models: The models.

    Returns:
        Number of the version.

    Raises:
        BuildError: A model of that name was not written by this program, another process is writing, or the disk is
            full.
    """
    _check_ours(repository, models)
    version = 1 + max([0, *(number for model in models for number in model_versions(repository / model.name))])
    with work_folder(repository) as work:
        stage = work / "models"
        remove(stage)
        placed: dict[Path, Path] = {}
        for model in models:
            _fill(stage / model.name / str(version), model, placed)
            (stage / model.name / CONFIG).write_text(HEADER + to_pbtxt(model.config), encoding="utf-8")
        if repository.exists():
            for model in models:
                _publish(stage / model.name, repository / model.name, version, work / "old")
        else:
            stage.rename(repository)
        shutil.rmtree(work)
    return version


def model_versions(folder: Path) -> list[int]:
    """Version numbers in a model's folder, ascending."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and int(name) > 0)


def _check_ours(repository: Path, models: Sequence[Model]) -> None:
    if repository.exists() and not repository.is_dir():
        raise BuildError(f"{repository}: is a file, expected a folder of models; choose another -o")
    for model in models:
        config = repository / model.name / CONFIG
        if config.parent.exists() and not (config.is_file() and config.read_text(errors="replace").startswith(HEADER)):
            raise BuildError(
                f"{config.parent}: is not a model that `ldm-export triton` wrote; move it or choose another -o"
            )


def _fill(folder: Path, model: Model, placed: dict[Path, Path]) -> None:
    """Write the files of one version, as hard links or, from another disk, as one copy for all models."""
    for name, source in model.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, str):
            path.write_text(source, encoding="utf-8")
            continue
        try:
            os.link(placed.get(source, source.resolve()), path)
        except OSError:
            shutil.copyfile(source, path)
        placed.setdefault(source, path)


def _publish(staged: Path, model: Path, version: int, old: Path) -> None:
    """Add a version to a model. Outdated versions are renamed into the folder ``old``, so that none is ever partial."""
    if not model.exists():
        staged.rename(model)
        return
    (staged / str(version)).rename(model / str(version))
    write_whole(model / CONFIG, (staged / CONFIG).read_bytes())
    for outdated in model_versions(model)[:-MAX_VERSIONS]:
        old.mkdir(exist_ok=True)
        remove(old / f"{model.name}-{outdated}")
        (model / str(outdated)).rename(old / f"{model.name}-{outdated}")
