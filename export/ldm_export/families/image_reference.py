"""diffusers' pipelines for requests that start from noise, from an image, or from an image and a mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image

from ldm_export.requests import RequestFields
from ldm_runtime.conditioning.image import image_array

__all__ = ["reference_call"]


def reference_call(pipeline: Any, request: RequestFields) -> Callable[..., Any]:
    """Return the call of diffusers that answers a request, with what only this kind of call takes.

    Args:
        pipeline: A StableDiffusionPipeline, whose components the others share, or a StableDiffusionInpaintPipeline.
        request: With height and width of the result.
    """
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    sides = {"height": request["height"], "width": request["width"]}
    if request.get("image") is None:
        return partial(pipeline, **sides, guidance_rescale=request.get("guidance_rescale", 0.0))
    options = {"image": _given(request, "image")}
    if request.get("strength") is not None:
        options["strength"] = request["strength"]
    kind: Any = StableDiffusionImg2ImgPipeline
    if request.get("mask") is not None:
        kind, options = StableDiffusionInpaintPipeline, {**options, **sides, "mask_image": _given(request, "mask")}
    other = kind(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return partial(other, **options)


def _given(request: RequestFields, name: str) -> Any:
    """PIL images as they are; arrays as torch tensors in [0, 1]."""
    value = request[name]
    listed = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(one, Image.Image) for one in listed):
        return list(listed)
    return torch.from_numpy(image_array(name, value))
