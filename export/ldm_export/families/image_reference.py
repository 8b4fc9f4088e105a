"""Selects diffusers' pipeline for a request: text to image, image to image, or inpainting."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image

from ldm_export.requests import RequestFields
from ldm_runtime.conditioning.image import image_array

__all__ = ["reference_call"]


def reference_call(pipeline: Any, request: RequestFields, kinds: tuple[Any, Any], **options: Any) -> Callable[..., Any]:
    """Return the call of diffusers that answers a request, with what only this kind of call takes.

    Args:
        pipeline: A pipeline that starts from noise, whose components the others share.
        request: With height and width of the result.
        kinds: The pipelines for requests with an image, and with an image and a mask.
        options: What these are constructed with besides components.
    """
    sides = {"height": request["height"], "width": request["width"]}
    if request.get("image") is None:
        return partial(pipeline, **sides, guidance_rescale=request.get("guidance_rescale", 0.0))
    given = {"image": _given(request, "image")}
    if request.get("strength") is not None:
        given["strength"] = request["strength"]
    from_image, inpaint = kinds
    kind = from_image
    if request.get("mask") is not None:
        kind, given = inpaint, {**given, **sides, "mask_image": _given(request, "mask")}
    other = kind(**pipeline.components, **options)
    other.set_progress_bar_config(disable=True)
    return partial(other, **given)


def _given(request: RequestFields, name: str) -> Any:
    """Return PIL images unchanged, and arrays as torch tensors in [0, 1]."""
    value = request[name]
    listed = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(one, Image.Image) for one in listed):
        return list(listed)
    return torch.from_numpy(image_array(name, value))
