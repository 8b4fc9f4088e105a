"""Requests to measure a model with: from prompts for models conditioned on text, plain ones without conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm_export.prompts import PROMPTS
from ldm_runtime.errors import SpecError
from ldm_runtime.model import ModelDescription

__all__ = [
    "RequestFields",
    "image_requests",
    "label",
    "label_requests",
    "plain_requests",
    "requests_for",
    "text_requests",
]

RequestFields = Mapping[str, Any]
"""Fields of ``ldm_runtime.request.Request`` for one image, JSON-able; fields left out take the model's defaults."""
IMAGES = 4
"""Requests of a model without conditioning; they differ in their seeds alone."""


def text_requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """One request for each prompt; None takes ``PROMPTS``."""
    return tuple({"prompts": prompt} for prompt in (PROMPTS if prompts is None else prompts))


def plain_requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """``IMAGES`` requests without any field.

    Raises:
        SpecError: Prompts are given.
    """
    if prompts is not None:
        raise SpecError("prompts: got some, but this model has no conditioning; leave them out")
    return ({},) * IMAGES


def label_requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """One request for each of the first ``IMAGES`` classes.

    Raises:
        SpecError: Prompts are given.
    """
    if prompts is not None:
        raise SpecError("prompts: got some, but this model is conditioned on class labels; leave them out")
    return tuple({"labels": label} for label in range(IMAGES))


def image_requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """``IMAGES`` requests without any field; the model's conditioning adds an example image of its size.

    Raises:
        SpecError: Prompts are given.
    """
    if prompts is not None:
        raise SpecError("prompts: got some, but this model starts from images; leave them out")
    return ({},) * IMAGES


def requests_for(model: ModelDescription, prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """Requests for a model whose family's module need not be installed.

    Raises:
        SpecError: The model takes no prompts, or is conditioned on something that has no default.
    """
    kinds = [entry.kind for entry in model.conditioning]
    if not kinds:
        return plain_requests(prompts)
    if kinds in (["image"], ["masked_image"]):
        return image_requests(prompts)
    if kinds == ["label"]:
        return label_requests(prompts)
    if kinds == ["text"]:
        return text_requests(prompts)
    raise SpecError(
        f"{model.family}: conditioned on {', '.join(kinds)}, which has no defaults, expected text, labels or images"
    )


def label(request: RequestFields) -> str:
    """A request as a short text for a table."""
    texts = [value for name, value in request.items() if name == "prompts" and isinstance(value, str)]
    others = [f"{name} {value}" for name, value in request.items() if name != "prompts" or not texts]
    return ", ".join((*texts, *others)) or "without conditioning"
