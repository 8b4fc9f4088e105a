"""Requests to measure a model with: from the prompts a user gives, or defaults that fit the model's conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_runtime.errors import SpecError
from ldm_runtime.model import ModelDescription

__all__ = ["SampleRequest", "caption", "sample_requests"]

SampleRequest = Mapping[str, Any]
"""Fields of ``ldm_runtime.Request`` for one image, JSON-able and without a seed, e.g. {"prompts": "a red circle"}."""
DEFAULT_COUNT = 4
"""Images of a model that needs no input."""


def sample_requests(model: ModelDescription, prompts: Sequence[str] | None = None) -> tuple[SampleRequest, ...]:
    """One request per prompt; for a model without conditioning, DEFAULT_COUNT empty requests.

    Args:
        model: Whose conditioning decides what a request holds.
        prompts: Texts, for a model conditioned on text.

    Raises:
        SpecError: Prompts for a model that takes none, or none for a model that needs them.
    """
    kinds = [entry.kind for entry in model.conditioning]
    if "text" in kinds:
        if not prompts:
            raise SpecError("prompts: got none, expected at least one; give a text file of them with --prompts")
        return tuple({"prompts": prompt} for prompt in prompts)
    if prompts:
        raise SpecError(f"--prompts: this {model.family} model is not conditioned on text; leave it out")
    return ({},) * DEFAULT_COUNT


def caption(request: SampleRequest) -> str:
    """What a request asks for, in a few words for a table."""
    return str(request.get("prompts") or ", ".join(f"{name} {value}" for name, value in request.items()))
