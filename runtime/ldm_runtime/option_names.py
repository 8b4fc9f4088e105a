"""Checks option names, and tells callers what options of diffusers' pipelines are called here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from ldm_runtime.errors import SpecError
from ldm_runtime.request import Request

__all__ = ["check_names"]

OF_DIFFUSERS = {
    "generator": "use seed=42, or seed=[1, 2] for a stream of random numbers per image",
    "num_images_per_prompt": "use images_per_prompt",
    "batch_size": "use count",
    "prompt": "give the prompt as the first argument",
    "prompt_2": "use prompts_2",
    "prompt_embeds": "prompts are encoded here; give texts",
    "negative_prompt_embeds": "prompts are encoded here; give negative_prompt as text",
    "class_labels": "use labels",
    "mask_image": "use mask",
    "output_type": "the result has .images (PIL), .arrays and .latents",
    "return_dict": "the result is always an object with .images, .arrays and .latents",
    "callback": "use on_progress",
    "callback_on_step_end": "use on_progress",
    "callback_steps": "on_progress is called after each step",
}
"""Option of diffusers -> what to use instead."""
_NAMES = frozenset(field.name for field in fields(Request))


def check_names(options: Mapping[str, Any]) -> None:
    """Check that options are fields of ``Request``.

    Raises:
        SpecError: An option is not; the message says what to use for an option of diffusers, or names the closest
            field.
    """
    for name in options:
        if name in _NAMES:
            continue
        if name in OF_DIFFUSERS:
            raise SpecError(f"{name}: is an option of diffusers' pipelines; {OF_DIFFUSERS[name]}")
        close = get_close_matches(name, _NAMES, 1)
        hint = f"did you mean {close[0]}?" if close else "see ldm_runtime.Request for the options"
        raise SpecError(f"{name[:60]}: is not an option of a generation; {hint}")
