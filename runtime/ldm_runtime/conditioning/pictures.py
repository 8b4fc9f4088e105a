"""Images and masks that denoising starts from, resized and cropped as by diffusers' VaeImageProcessor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from ldm_runtime.conditioning.image import image_array
from ldm_runtime.images import CHANNELS, pil_image, to_pil
from ldm_runtime.input_images import rgb_image

__all__ = ["MAX_BLUR", "Box", "Pictures", "blurred", "crop_box", "pasted", "pictures_of", "resized", "sides_of"]

F32 = NDArray[np.float32]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""
MASK_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
"""Modes of masks that are resized as they are, as diffusers does."""
MAX_BLUR = 64
"""Largest standard deviation in pixels with which a mask is blurred."""
LANCZOS = Image.Resampling.LANCZOS


class Pictures(list[Image.Image]):
    """Upright PIL images, as ``pictures_of`` has converted them.

    Attributes:
        from_array: True if they were given as an array.
    """

    from_array = False


def pictures_of(given: Any) -> Pictures:
    """Return PIL images as a list, and convert uint8 arrays [H, W, C] or [N, H, W, C] to them; [] for anything else.

    A result of this function is returned as it is.
    """
    if isinstance(given, Pictures):
        return given
    images = [given] if isinstance(given, Image.Image) else given
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim in (3, 4) and images.size:
        arrays = images[None] if images.ndim == 3 else images
        images = [pil_image(one) for one in arrays] if arrays.shape[3] in CHANNELS else []
    is_list = isinstance(images, list | tuple) and all(isinstance(one, Image.Image) for one in images)
    found = Pictures(ImageOps.exif_transpose(one) for one in images) if is_list else Pictures()
    found.from_array = isinstance(given, np.ndarray)
    return found


def blurred(masks: Pictures, radius: float) -> Pictures:
    """Blur masks as ``VaeImageProcessor.blur`` of diffusers does; a radius of 0 changes nothing."""
    if not radius:
        return masks
    result = Pictures(one.convert("L").filter(ImageFilter.GaussianBlur(radius)) for one in masks)
    result.from_array = masks.from_array
    return result


def sides_of(name: str, given: Any) -> tuple[int, ...]:
    """Height and width in pixels.

    Raises:
        SpecError: The value is neither PIL images nor an array of images; the message contains ``name``.
    """
    if pictures := pictures_of(given):
        return pictures[0].height, pictures[0].width
    return image_array(name, given).shape[2:]


def resized(given: Any, sides: tuple[int, int], *, mask: bool = False, box: Box | None = None) -> Any:
    """Resize PIL images and uint8 arrays to height and width; return other arrays unchanged.

    Args:
        given: The value that the caller gave.
        sides: Height and width.
        mask: True if they are masks, which are converted to grey after resizing.
        box: Part of the images to take. It keeps its proportions; its edge pixels are repeated to fill the size.
    """
    if not (pictures := pictures_of(given)):
        return given
    images = [one if mask and one.mode in MASK_MODES else rgb_image(one) for one in pictures]
    if box is None:
        images = [one.resize((sides[1], sides[0]), LANCZOS) for one in images]
    else:
        images = [_filled(one.crop(box), sides) for one in images]
    return np.stack([np.asarray(one.convert("L")) for one in images])[..., None] if mask else images


def crop_box(mask: Image.Image, sides: tuple[int, int], padding: int) -> Box:
    """Return the part of an image around a mask, with the proportions of the result if the image is large enough.

    Args:
        mask: Mask in which some pixel is not black.
        sides: Height and width of the result.
        padding: Pixels added on each side of the mask.
    """
    marked = np.asarray(mask.convert("L")) != 0
    columns, rows = (np.flatnonzero(marked.any(axis=axis)).tolist() for axis in (0, 1))
    x = (max(columns[0] - padding, 0), min(columns[-1] + 1 + padding, mask.width))
    y = (max(rows[0] - padding, 0), min(rows[-1] + 1 + padding, mask.height))
    height, width = sides
    if (x[1] - x[0]) / (y[1] - y[0]) > width / height:
        y = _widened(y, int((x[1] - x[0]) / (width / height) - (y[1] - y[0])), mask.height)
    else:
        x = _widened(x, int((y[1] - y[0]) * (width / height) - (x[1] - x[0])), mask.width)
    return x[0], y[0], x[1], y[1]


def _widened(ends: tuple[int, int], more: int, size: int) -> tuple[int, int]:
    """Lengthen an interval by ``more``, then move it into 0..size; cut it if it is longer than ``size``."""
    first, last = ends[0] - more // 2, ends[1] + more - more // 2
    beyond = max(0, last - size)
    first, last = first - beyond, last - beyond
    return max(0, first), min(last - min(0, first), size)


def pasted(images: F32, original: Image.Image, mask: Image.Image, box: Box) -> F32:
    """Paste generated parts into an image where the mask is white.

    Args:
        images: float32 [N, 3, h, w] in [0, 1].
        original: The whole image.
        mask: Its mask, of the same size.
        box: Position of the parts in the image.

    Returns:
        float32 [N, 3, H, W] in [0, 1] of the original's size.
    """
    original = rgb_image(original)
    kept = Image.new("RGBa", original.size)
    kept.paste(original.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    kept = kept.convert("RGBA")
    results = []
    for part in to_pil(images):
        whole = Image.new("RGBA", original.size)
        whole.paste(_cropped(part, (box[3] - box[1], box[2] - box[0])), box[:2])
        whole = whole.convert("RGB").convert("RGBA")
        whole.alpha_composite(kept)
        results.append(np.asarray(whole.convert("RGB")))
    return np.ascontiguousarray(np.stack(results).transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def _fitted(image: Image.Image, sides: Sequence[int], inside: bool) -> tuple[Image.Image, tuple[int, int], Image.Image]:
    """Resize an image to fit inside or to cover a rectangle. Return it, its position, and the rectangle with it."""
    height, width = sides
    wide = width / height < image.width / image.height
    by_width = wide if inside else not wide and width / height != image.width / image.height
    size = (
        width if by_width else max(1, image.width * height // image.height),
        height if not by_width else max(1, image.height * width // image.width),
    )
    small = image.resize(size, LANCZOS)
    place = width // 2 - size[0] // 2, height // 2 - size[1] // 2
    result = Image.new("RGB", (width, height))
    result.paste(small, place)
    return small, place, result


def _cropped(image: Image.Image, sides: Sequence[int]) -> Image.Image:
    """Resize an image so that it covers height and width, and crop its middle."""
    return _fitted(image, sides, inside=False)[2]


def _filled(image: Image.Image, sides: Sequence[int]) -> Image.Image:
    """Resize the whole image to fit into height and width, and repeat its edges on both sides."""
    small, (left, top), result = _fitted(image, sides, inside=True)
    height, width = sides
    if top > 0:
        edge = small.resize((width, top), box=(0, 0, width, 0))
        result.paste(edge, (0, 0))
        edge = small.resize((width, top), box=(0, small.height, width, small.height))
        result.paste(edge, (0, top + small.height))
    elif left > 0:
        edge = small.resize((left, height), box=(0, 0, 0, height))
        result.paste(edge, (0, 0))
        edge = small.resize((left, height), box=(small.width, 0, small.width, height))
        result.paste(edge, (left + small.width, 0))
    return result
