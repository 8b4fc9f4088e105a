"""The optional demo models of the distribution ``ldm-export-demo``: checkpoints, prompts and a grader.

No other module knows the demo models. A model is recognised by the digest of its weights, never by the name of a
folder. "The demo model" is the text-to-image model; there are others for super-resolution and inpainting.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ldm_export.checkpoint.digest import CHECKPOINT_SHA256, weight_files, weights_sha256
from ldm_export.prompts import PROMPTS
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError

if TYPE_CHECKING:
    from ldm_calibration.model import ImageRequest
    from ldm_calibration.settings import Grade

__all__ = [
    "TASKS",
    "Model",
    "calibration_prompts",
    "default_prompts",
    "demo_checkpoint",
    "demo_config",
    "demo_grader",
    "demo_task",
    "is_demo",
]

TASKS = ("text-to-image", "super-resolution", "inpainting")
"""Tasks that have a demo model; the first is the default."""

Model = Bundle | Path | None
"""A bundle, a checkpoint folder, or None for a model with random weights, which is never the demo model."""


def demo_checkpoint(task: str = TASKS[0]) -> Path:
    """Return the checkpoint of an installed demo model: a diffusers folder, or a file for the inpainting model.

    Args:
        task: One of ``TASKS``.

    Raises:
        BuildError: The package ldm_export_demo is not installed.
    """
    package = _package()
    if package is None:
        raise BuildError(
            "checkpoint: got none, and the demo model is not installed; give a diffusers folder, or install the demo "
            "model from a checkout of ldm-export with `pip install ./demo` or `make demo`"
        )
    path: Path = package.checkpoint_path(task)
    return path


def demo_config(task: str) -> Path | None:
    """Return the yaml of a demo model whose checkpoint is a file; None for a folder or if none is installed."""
    package = _package()
    config: Path | None = None if package is None else package.checkpoint_config(task)
    return config


def demo_task(bundle: Bundle) -> str | None:
    """Return the task of the demo model that a bundle was built from; None if it was built from another model.

    Raises:
        CheckpointError: A weight file of a demo model cannot be read.
    """
    digest = bundle.manifest.request.get(CHECKPOINT_SHA256)
    tasks = () if _package() is None else TASKS
    return next((task for task in tasks if digest == _demo_sha256(task)), None)


def is_demo(model: Model) -> bool:
    """True if a model has the weights of the installed text-to-image demo model; False if none is installed.

    A bundle is compared by the digest that its build recorded, a checkpoint folder by the digest of its weight files.

    Raises:
        CheckpointError: A weight file cannot be read.
    """
    package = _package()
    if package is None or model is None:
        return False
    if isinstance(model, Bundle):
        return bool(model.manifest.request.get(CHECKPOINT_SHA256) == _demo_sha256())
    same_sizes = _sizes(model) == _sizes(package.checkpoint_folder())  # avoids hashing gigabytes of other models
    return same_sizes and weights_sha256(model) == _demo_sha256()


def default_prompts(model: Model) -> tuple[str, ...]:
    """Return four prompts to measure a model with: the demo model's own, or general ones for other models."""
    package = _demo(model)
    return PROMPTS if package is None else tuple(package.PROMPTS)


def calibration_prompts(model: Model, calibration: int, trials: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return prompts for int8 calibration and for trial images; None for a model other than the demo model.

    Args:
        model: The model.
        calibration: Number of calibration prompts.
        trials: Number of trial prompts, none of which is a calibration prompt.
    """
    package = _demo(model)
    if package is None:
        return None
    return tuple(package.calibration_prompts(calibration)), tuple(package.trial_prompts(trials))


def demo_grader(model: Model) -> Grade | None:
    """Return the grader of the demo model's images; None for a model other than the demo model.

    The grader takes images uint8 [64, 64, 3] and a request for each. It returns which images show what their prompts
    describe, or None if it cannot grade them, because a prompt does not follow the demo model's grammar or an image has
    another size.
    """
    package = _demo(model)
    if package is None:
        return None

    def grade(images: Sequence[NDArray[np.uint8]], requests: Sequence[ImageRequest]) -> list[bool] | None:
        try:
            correct: list[bool] = package.grade(images, [request["prompts"] for request in requests])
        except (KeyError, ValueError):
            return None
        return correct

    return grade


def _demo(model: Model) -> ModuleType | None:
    return _package() if is_demo(model) else None


def _package() -> ModuleType | None:
    try:
        import ldm_export_demo
    except ModuleNotFoundError as error:
        if error.name != "ldm_export_demo":
            raise
        return None
    package: ModuleType = ldm_export_demo
    return package


def _sizes(folder: Path) -> dict[str, int]:
    return {name: path.stat().st_size for name, path in weight_files(folder).items()}


@cache
def _demo_sha256(task: str = TASKS[0]) -> str | None:
    return None if _package() is None else weights_sha256(demo_checkpoint(task))
