"""Default prompts for measuring a model, used when no prompts are given."""

from __future__ import annotations

__all__ = ["PROMPTS"]

PROMPTS = (
    "a photo of a cat sitting on a chair",
    "a painting of a sailing boat on a calm lake",
    "a bowl of fresh fruit on a wooden table",
    "a street in an old town on a rainy evening",
)
"""Four ordinary prompts; they assume nothing about the images a model was trained on."""
