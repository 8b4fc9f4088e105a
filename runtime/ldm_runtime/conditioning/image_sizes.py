"""Sizes of images that condition a model: checks, the size of their latents, and resizing to what the graphs take."""

from __future__ import annotations

import logging
from typing import Any

from numpy.typing import NDArray
from PIL import Image, ImageOps

from ldm_runtime.errors import SpecError
from ldm_runtime.input_images import rgb_image
from ldm_runtime.specs import Axis, Dim, TensorSpec

__all__ = ["check_sides", "check_size", "fitted", "latent_sides", "report_fitted"]

log = logging.getLogger(__name__)


def check_size(name: str, array: NDArray[Any], tensor: TensorSpec) -> None:
    """Check channels, height and width of images [N, channels, h, w] for a tensor.

    Raises:
        SpecError: The tensor takes other sizes.
    """
    channels, expected = array.shape[1], tensor.shape[1]
    if channels != expected:
        raise SpecError(f"{name}: got {channels} channels, expected {expected}")
    check_sides(name, array.shape[2:], tensor.shape[2:])


def check_sides(name: str, sides: tuple[int, ...], dims: tuple[Dim, ...]) -> None:
    """Check height and width in pixels.

    Raises:
        SpecError: The dimensions take other sizes.
    """
    if all(dim.admits(side) if isinstance(dim, Axis) else side == dim for side, dim in zip(sides, dims, strict=True)):
        return
    wanted = " x ".join(_range(dim) for dim in dims)
    raise SpecError(f"{name}: got {sides[0]} x {sides[1]} pixels (height, width), expected {wanted}; resize the image")


def latent_sides(sides: tuple[int, ...], dims: tuple[Dim, ...]) -> tuple[int, int] | None:
    """Height and width of the latents for an image with these sides; None if the model has a single size."""
    found = [side // dim.scale for side, dim in zip(sides, dims, strict=True) if isinstance(dim, Axis)]
    return (found[0], found[1]) if len(found) == 2 else None


def fitted(given: Any, dims: tuple[Dim, ...], multiple: int, resample: Image.Resampling) -> Any:
    """Resize PIL images so that their sides are multiples that the model takes, rounded down. Keep anything else.

    Args:
        given: A PIL image, a list of them, or arrays, which are not resized.
        dims: Height and width of the tensor.
        multiple: A further number that must divide both sides.
        resample: Resampling filter of Pillow.
    """
    images = [given] if isinstance(given, Image.Image) else given
    if not (isinstance(images, list | tuple) and images and all(isinstance(one, Image.Image) for one in images)):
        return given
    return [_fitted(one, dims, multiple, resample) for one in images]


def report_fitted(name: str, given: Any, array: NDArray[Any]) -> None:
    """Log a warning if PIL images were resized to the last two axes of an array."""
    first = given[0] if isinstance(given, list | tuple) and given else given
    height, width = array.shape[-2:]
    if isinstance(first, Image.Image) and sorted(first.size) != sorted((width, height)):  # rotating is not resizing
        was = f"{first.size[0]} x {first.size[1]}"
        log.warning(
            "%s: resized from %s to %d x %d pixels (width, height), which the model takes", name, was, width, height
        )


def _fitted(image: Image.Image, dims: tuple[Dim, ...], multiple: int, resample: Image.Resampling) -> Image.Image:
    image = rgb_image(image) if resample == Image.Resampling.LANCZOS else ImageOps.exif_transpose(image)
    sides = []
    for side, dim in zip((image.height, image.width), dims, strict=True):
        step = max(dim.scale, multiple) if isinstance(dim, Axis) else 1
        sides.append(side // step * step or side)
    size = (sides[1], sides[0])
    return image if size == image.size else image.resize(size, resample)


def _range(dim: Dim) -> str:
    if not isinstance(dim, Axis):
        return str(dim)
    multiples = f"multiples of {dim.scale} from " if dim.scale > 1 else ""
    return f"{multiples}{dim.min * dim.scale}..{dim.max * dim.scale}"
