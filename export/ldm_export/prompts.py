"""Default prompts for measuring a model, used when no prompts are given."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_calibration.quality import Grader

__all__ = ["NEUTRAL", "PROMPTS", "PromptSet"]

PROMPTS = (
    "a photo of a cat sitting on a chair",
    "a painting of a sailing boat on a calm lake",
    "a bowl of fresh fruit on a wooden table",
    "a street in an old town on a rainy evening",
)
"""Four ordinary prompts; they assume nothing about the images a model was trained on."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts that a build measures a model with, and how its images are graded.

    Attributes:
        prompts: Prompts of the trajectories on which tensor ranges are measured for half precision.
        grade: Decides which images match their prompts, for a bound on int8's loss of prompt accuracy; None if the
            model has no grader.
    """

    prompts: tuple[str, ...] = PROMPTS
    grade: Grader | None = None


NEUTRAL = PromptSet()
"""The default prompts, and no grader."""
