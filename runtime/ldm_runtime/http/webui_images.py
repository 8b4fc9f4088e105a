"""Input images of AUTOMATIC1111's API: start images, mask and their options in ``/sdapi/v1/img2img``.

Options mean the same as in version 1.10 where diffusers' pipelines agree with it; docs/guides/http-clients.md lists the
differences.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from ldm_runtime.conditioning.pictures import MAX_BLUR
from ldm_runtime.errors import SpecError
from ldm_runtime.http.api_error import api_error
from ldm_runtime.http.webui_request import invalid
from ldm_runtime.input_images import open_image, rgb_image
from ldm_runtime.number_checks import integer, number, shown

__all__ = ["IMAGE_CHECKED", "start_fields"]

IMAGE_CHECKED = (
    "denoising_strength",
    "resize_mode",
    "mask_blur",
    "mask_blur_x",
    "mask_blur_y",
    "inpainting_fill",
    "inpaint_full_res",
    "inpaint_full_res_padding",
    "inpainting_mask_invert",
    "initial_noise_multiplier",
)
"""Fields of ``img2img`` only whose values are checked, so that a response can repeat them."""
NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "resize_mode": ((0,), "0, which resizes the images to width and height"),
    "inpainting_fill": ((0, 1), "0 or 1: the masked part starts from the image; with denoising_strength 1 from noise"),
    "initial_noise_multiplier": ((1,), "1, or leave it out"),
    "latent_mask": ((), "none; send the mask in mask"),
}
"""Field -> values that are accepted besides null, and a description of them."""
MASK_BLUR = 4.0
"""Default standard deviation in pixels with which masks are blurred, as in the original."""
MAX_IMAGES, MAX_PADDING = 20, 2**16
OPAQUE = 128
"""Opacity above which a pixel of a mask with transparency is repainted."""


def start_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Translate start images, mask and their options to fields of the images API: ``image``, ``mask``, ``strength``, ….

    White pixels of a mask are repainted; in a mask with transparency, opaque pixels are. With ``inpaint_full_res``,
    which is on by default, only the part around the mask is generated.

    Raises:
        ApiError: A field has the wrong type, asks for something that is not supported, or is not an image.
    """
    try:
        return _translated(fields)
    except SpecError as error:
        raise api_error(error) from None


def _translated(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name, (values, expected) in NEUTRAL.items():
        if (value := fields.get(name)) is not None and value not in values:
            raise invalid(name, f"got {shown(value)}, expected {expected}")
    given = fields.get("init_images")
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_IMAGES:
        raise invalid("init_images", f"got {shown(given)}, expected a list of 1 to {MAX_IMAGES} images in base64")
    blur, inverted = _blur(fields), _flag(fields, "inpainting_mask_invert", False)
    padding = integer("inpaint_full_res_padding", fields.get("inpaint_full_res_padding") or 0, 0, MAX_PADDING)
    cropped = _flag(fields, "inpaint_full_res", True)
    options = {
        "image": [rgb_image(_image(one, "init_images")) for one in given],
        "strength": fields.get("denoising_strength"),
    }
    if fields.get("mask") is not None:
        options["mask"] = _mask(_image(fields["mask"], "mask"), inverted, blur)
        options["padding_mask_crop"] = padding if cropped else None
    return {name: value for name, value in options.items() if value is not None}


def _image(text: Any, name: str) -> Image.Image:
    """Decode an image in base64, plain or as a data URL."""
    if not isinstance(text, str):
        raise invalid(name, f"got {shown(text)}, expected an image in base64")
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError:
        raise invalid(name, f"got {shown(text)}, expected the bytes of a PNG or JPEG in base64") from None
    return open_image(io.BytesIO(data), name)


def _mask(mask: Image.Image, inverted: bool, blur: tuple[float, float]) -> Image.Image:
    if mask.mode == "RGBA" and mask.getchannel("A").getextrema() != (255, 255):
        mask = mask.getchannel("A").point(lambda alpha: 255 if alpha > OPAQUE else 0)
    mask = mask.convert("L")
    if inverted:
        mask = ImageOps.invert(mask)
    return mask.filter(ImageFilter.GaussianBlur(blur)) if any(blur) else mask


def _blur(fields: Mapping[str, Any]) -> tuple[float, float]:
    """Standard deviations of the mask blur along x and y; ``mask_blur`` takes precedence over the values per axis."""
    both, x, y = (
        None if fields.get(name) is None else number(name, fields[name], 0, MAX_BLUR)
        for name in ("mask_blur", "mask_blur_x", "mask_blur_y")
    )
    if both is not None:
        return both, both
    return MASK_BLUR if x is None else x, MASK_BLUR if y is None else y


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    """Read a boolean; clients also send 0 or 1."""
    if (value := fields.get(name)) is None:
        return default
    if value not in (0, 1):
        raise invalid(name, f"got {shown(value)}, expected true or false")
    return bool(value)
