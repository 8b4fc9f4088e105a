"""Default requests with which ``verify``, ``bench`` and ``report`` measure a model, by its kinds of conditioning."""

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
"""Fields of a ``ldm_runtime.request.Request`` for one image, as JSON values; missing fields take the model's
defaults."""
IMAGES = 4
"""Number of default requests of a model that takes no prompts."""
MAX_LISTED = 6
"""Maximum number of values of a list in a label."""


def text_requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """Return one request per prompt; None means ``PROMPTS``."""
    return tuple({"prompts": prompt} for prompt in (PROMPTS if prompts is None else prompts))


def label_requests(prompts: Sequence[str] | None) -> tuple[RequestFields, ...]:
    """Return a request for each of the first ``IMAGES`` classes.

    Raises:
        SpecError: Prompts are given.
    """
    _refuse(prompts, "is conditioned on class labels")
    return tuple({"labels": label} for label in range(IMAGES))


def _examples(model: str) -> Callable[[Sequence[str] | None], tuple[RequestFields, ...]]:
    """Create a function that returns ``IMAGES`` requests without fields; the conditioning adds example values.

    It raises SpecError for prompts; ``model`` says in the message what the model is conditioned on instead.
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
    """Return requests for a model. Its family's module is not needed.

    Raises:
        SpecError: The model takes no prompts, or has a kind of conditioning without default requests.
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
    """Return a request as a short text for a table."""
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
