"""Default requests with which ``verify``, ``bench`` and ``report`` measure a model, by what it is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_export.prompts import PROMPTS
from ldm_runtime.errors import SpecError
from ldm_runtime.model import ModelDescription

__all__ = [
    "RequestFields",
    "image_requests",
    "label",
    "label_requests",
    "layout_requests",
    "plain_requests",
    "requests_for",
    "segmentation_requests",
    "text_requests",
]

RequestFields = Mapping[str, Any]
"""Fields of ``ldm_runtime.request.Request`` for one image, JSON-able; fields left out take the model's defaults."""
IMAGES = 4
"""Number of default requests of a model that takes no prompts."""
MAX_LISTED = 6
"""Longest list of values in a label."""


def text_requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """Return one request per prompt; None means ``PROMPTS``."""
    return tuple({"prompts": prompt} for prompt in (PROMPTS if prompts is None else prompts))


def label_requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """One request for each of the first ``IMAGES`` classes.

    Raises:
        SpecError: Prompts are given.
    """
    _refuse(prompts, "is conditioned on class labels")
    return tuple({"labels": label} for label in range(IMAGES))


def _examples(model: str) -> Callable[[Sequence[str] | None], tuple[RequestFields, ...]]:
    """A function that returns ``IMAGES`` requests without any field; the conditioning adds its example.

    It raises SpecError for prompts, with what the ``model`` does instead.
    """

    def requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
        _refuse(prompts, model)
        return ({},) * IMAGES

    return requests


plain_requests = _examples("has no conditioning")
image_requests = _examples("starts from images")
segmentation_requests = _examples("is conditioned on segmentations")
layout_requests = _examples("is conditioned on layouts")

REQUESTS: Mapping[str, Callable[[Sequence[str] | None], tuple[RequestFields, ...]]] = {
    "text": text_requests,
    "label": label_requests,
    "image": image_requests,
    "masked_image": image_requests,
    "segmentation": segmentation_requests,
    "layout": layout_requests,
}
"""Default requests by the first kind of a model's conditioning; further kinds add to it and need no fields."""


def requests_for(model: ModelDescription, prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """Requests for a model whose family's module need not be installed.

    Raises:
        SpecError: The model takes no prompts, or is conditioned on something that has no default.
    """
    if not model.conditioning:
        return plain_requests(prompts)
    kind = model.conditioning[0].kind
    if kind in REQUESTS:
        return REQUESTS[kind](prompts)
    raise SpecError(
        f"{model.family}: conditioned on {kind}, which has no defaults, expected one of {', '.join(REQUESTS)}"
    )


def label(request: RequestFields) -> str:
    """A request as a short text for a table."""
    texts = [value for name, value in request.items() if name == "prompts" and isinstance(value, str)]
    others = [_labelled(name, value) for name, value in request.items() if name != "prompts" or not texts]
    return ", ".join((*texts, *others)) or "without conditioning"


def _labelled(name: str, value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim >= 2:
        return f"{name} of {value.shape[-1]} x {value.shape[-2]} pixels"
    if isinstance(value, list | tuple) and len(value) > MAX_LISTED:
        return f"{name} {' '.join(map(str, value[:MAX_LISTED]))} …"
    return f"{name} {value}"


def _refuse(prompts: Sequence[str] | None, model: str) -> None:
    if prompts is not None:
        raise SpecError(f"prompts: got some, but this model {model}; leave them out")
