"""The optional demo model, distribution ``ldm-export-demo``: its checkpoint, its prompts and its grader.

Only this module of the product knows the demo model. The model is recognised by the digest of its weights, never by
the name of a folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ldm_export.checkpoint.digest import weights_sha256
from ldm_export.prompts import PROMPTS
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError

__all__ = [
    "CHECKPOINT_SHA256",
    "bundle_sha256",
    "calibration_prompts",
    "default_prompts",
    "demo_checkpoint",
    "demo_grader",
    "is_demo",
]

CHECKPOINT_SHA256 = "checkpoint_sha256"
"""Key of a manifest's ``request`` under which a build records the digest of its checkpoint's weights."""


def demo_checkpoint() -> Path:
    """The checkpoint folder of the installed demo model.

    Raises:
        BuildError: The package ldm_export_demo is not installed.
    """
    package = _package()
    if package is None:
        raise BuildError(
            "checkpoint: got none, and the demo model is not installed; give a diffusers folder, or install the demo "
            "model from a checkout of ldm-export with `pip install ./demo` (`make demo` does it too)"
        )
    folder: Path = package.checkpoint_folder()
    return folder


def is_demo(sha256: object) -> bool:
    """True if a digest made by ``weights_sha256`` is that of the installed demo model's weights."""
    return sha256 is not None and sha256 == _demo_sha256()


def bundle_sha256(bundle: Bundle) -> object:
    """The digest of the weights that a bundle was built from; None if the bundle does not record it.

    The value comes from a file that may be untrusted, and can be of any JSON type.
    """
    return bundle.manifest.request.get(CHECKPOINT_SHA256)


def default_prompts(sha256: object) -> tuple[str, ...]:
    """Four prompts to measure a model with: the demo model's own, neutral ones for every other model.

    Args:
        sha256: Digest of the model's weights, or None if it is not known.
    """
    package = _package()
    return tuple(package.PROMPTS) if package is not None and is_demo(sha256) else PROMPTS


def calibration_prompts(
    sha256: object, calibration: int, trials: int
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Prompts to calibrate int8 with and prompts to try it on; None for a model other than the demo model.

    Args:
        sha256: Digest of the model's weights, or None if it is not known.
        calibration: Number of calibration prompts.
        trials: Number of trial prompts; they are held out, so the calibration prompts contain none of them.
    """
    package = _package()
    if package is None or not is_demo(sha256):
        return None
    return tuple(package.calibration_prompts(calibration)), tuple(package.trial_prompts(trials))


def demo_grader(sha256: object) -> Callable[[Sequence[NDArray[np.uint8]], Sequence[str]], list[bool] | None] | None:
    """The grader of the demo model's images; None for a model other than the demo model.

    The grader takes images uint8 [64, 64, 3] and one prompt for each. It returns which images show what their prompts
    say, or None if it cannot grade them, because a prompt is not of the demo model's grammar or an image has another
    size.

    Args:
        sha256: Digest of the model's weights, or None if it is not known.
    """
    package = _package()
    if package is None or not is_demo(sha256):
        return None

    def grade(images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[bool] | None:
        try:
            correct: list[bool] = package.grade(images, prompts)
        except ValueError:
            return None
        return correct

    return grade


def _package() -> ModuleType | None:
    try:
        import ldm_export_demo
    except ModuleNotFoundError as error:
        if error.name != "ldm_export_demo":
            raise
        return None
    package: ModuleType = ldm_export_demo
    return package


@cache
def _demo_sha256() -> str | None:
    package = _package()
    return None if package is None else weights_sha256(package.checkpoint_folder())
