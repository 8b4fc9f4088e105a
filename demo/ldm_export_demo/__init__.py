"""The demo models of ldm-export: checkpoints for 64×64 images of coloured shapes, prompts and graders.

Example:
    >>> from ldm_export_demo import checkpoint_folder, grade, trial_prompts
    >>> sorted(path.name for path in checkpoint_folder().iterdir() if path.is_dir())
    ['bert', 'scheduler', 'tokenizer', 'unet', 'vqvae']
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ldm_export_demo.drawing import PIXELS
from ldm_export_demo.grader import grade as _grade
from ldm_export_demo.grammar import calibration_prompts, parse, trial_prompts

__all__ = [
    "CHECKPOINTS",
    "PROMPTS",
    "calibration_prompts",
    "checkpoint_config",
    "checkpoint_folder",
    "checkpoint_path",
    "grade",
    "trial_prompts",
]

try:
    __version__ = version("ldm-export-demo")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

PROMPTS = (
    "a large red circle in the center on a white background",
    "a small blue triangle at the top left on a yellow background",
    "a small green square left of a large purple cross on a gray background",
    "a large orange triangle above a small blue circle on a black background",
)
"""Default prompts for measuring the demo model."""


CHECKPOINTS = {
    "text-to-image": "checkpoint",
    "super-resolution": "super_resolution",
    "inpainting": "inpainting/model.safetensors",
}
"""Task -> its checkpoint in this package: a folder of diffusers, or a file with the tensor names of CompVis."""


def checkpoint_path(task: str) -> Path:
    """The checkpoint of a task, one of ``CHECKPOINTS``: a diffusers folder, or for inpainting a file.

    Raises:
        KeyError: There is no demo model of this task.
    """
    return Path(__file__).parent / CHECKPOINTS[task]


def checkpoint_config(task: str) -> Path | None:
    """The yaml that belongs to a task's checkpoint file; None for a diffusers folder, which has its own configs."""
    path = checkpoint_path(task)
    return path.with_suffix(".yaml") if path.suffix else None


def checkpoint_folder() -> Path:
    """The folder of the text-to-image model: ``DiffusionPipeline.from_pretrained`` of diffusers loads it."""
    return checkpoint_path("text-to-image")


def grade(images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> list[bool]:
    """Decide for each image whether it shows everything that its prompt says.

    Args:
        images: uint8 [N, 64, 64, 3] RGB, or a sequence of N images uint8 [64, 64, 3].
        prompts: N sentences of the grammar.

    Raises:
        ValueError: A prompt is not a sentence of the grammar, an image has another shape or dtype, or the numbers of
            images and prompts differ.
    """
    sentences = [parse(prompt) for prompt in prompts]
    if len(images) != len(sentences):
        raise ValueError(f"images: got {len(images)} for {len(sentences)} prompts, expected one image for each prompt")
    for image in images:
        if image.shape != (PIXELS, PIXELS, 3):
            raise ValueError(f"image: got shape {list(image.shape)}, expected [{PIXELS}, {PIXELS}, 3]")
    return [_grade(image, sentence).correct for image, sentence in zip(images, sentences, strict=True)]
