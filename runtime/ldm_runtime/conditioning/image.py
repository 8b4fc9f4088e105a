"""Image conditioning: the UNet takes images in addition to the noisy latents, e.g. images to enlarge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.image_sizes import check_size, fitted, latent_sides, report_fitted
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.input_images import rgb_image
from ldm_runtime.model import UNET, ConditioningSpec
from ldm_runtime.number_checks import shown
from ldm_runtime.request import Request
from ldm_runtime.specs import TensorSpec

__all__ = ["ImageConditioner", "example_image", "image_array"]

F32 = NDArray[np.float32]


class ImageConditioner:
    """Passes images to the UNet without encoding them.

    Args:
        tensor: The UNet's input, float32 [N, channels, h, w] in [-1, 1].
        multiple: Sides of PIL images are rounded down to multiples of it.
    """

    kind: ClassVar[str] = "image"
    fields: ClassVar[frozenset[str]] = frozenset({"image", "images_per_prompt"})

    def __init__(self, tensor: TensorSpec, multiple: int = 1):
        self._tensor, self._multiple = tensor, multiple

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> ImageConditioner:
        """Construct from a manifest entry with the optional setting "multiple".

        Raises:
            ManifestError: The UNet has no such input.
        """
        tensors = [
            tensor for tensor in backends[UNET].inputs if spec.inputs == (tensor.name,) and len(tensor.shape) == 4
        ]
        if not tensors or tensors[0].dtype != "float32":
            raise ManifestError(f"conditioning: image: got {spec}, expected an input of the UNet; rebuild the bundle")
        return cls(tensors[0], max(1, spec.settings.get("multiple", 1)))

    def images(self, request: Request) -> int:
        """Check the images and return their number, times ``images_per_prompt``.

        Raises:
            SpecError: There are no images, they are no supported type, or have a size that the model does not take.
        """
        if request.image is None:
            raise SpecError("image: got none, expected one or more images; this model starts from images")
        array = self._array(request)
        report_fitted("image", request.image, array)
        return len(array) * request.repeats()

    def size(self, request: Request) -> tuple[int, int] | None:
        """Height and width of the latents, those of the images."""
        return latent_sides(self._array(request).shape[2:], self._tensor.shape[2:])

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """The images float32 [images, channels, h, w] in [-1, 1], the same for every branch."""
        return {self._tensor.name: np.repeat(self._array(request), request.images_per_prompt, axis=0)}

    def example(self) -> dict[str, Any]:
        """An image of the model's default size: a colour gradient."""
        return {"image": example_image(self._tensor)}

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def close(self) -> None:
        """Nothing to free."""

    def _array(self, request: Request) -> F32:
        given = fitted(request.image, self._tensor.shape[2:], self._multiple, Image.Resampling.LANCZOS)
        array = image_array("image", given) * np.float32(2) - np.float32(1)
        check_size("image", array, self._tensor)
        return array


def example_image(tensor: TensorSpec) -> F32:
    """A colour gradient float32 [1, channels, h, w] in [0, 1] of the size of a tensor."""
    _, channels, height, width = tensor.bounds("opt")
    ramps = (np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None, :])
    planes = [np.broadcast_to(ramps[channel % 2], (height, width)) for channel in range(channels)]
    return np.stack(planes)[None].astype(np.float32)


def image_array(name: str, value: Any) -> F32:
    """Convert images in any supported form to float32 [N, channels, H, W] in [0, 1].

    Args:
        name: Name of the field, for messages.
        value: A PIL image, a list of them, uint8 [H, W, 3] or [N, H, W, 3] (also as nested lists), or float32
            [N, channels, H, W] in [0, 1].

    Raises:
        SpecError: Another form, images of different sizes, or values out of range.
    """
    if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim == 4 and len(value):
        if not (np.isfinite(value).all() and value.min() >= 0 and value.max() <= 1):
            raise SpecError(f"{name}: got values from {value.min():g} to {value.max():g}, expected 0 to 1")
        return value
    images = [value] if isinstance(value, Image.Image) else value
    if isinstance(images, list | tuple) and images and all(isinstance(one, Image.Image) for one in images):
        if len({one.size for one in images}) != 1:
            raise SpecError(f"{name}: got images of different sizes, expected one size; make several calls")
        images = np.stack([np.asarray(rgb_image(one)) for one in images])
    try:
        array = np.asarray(images)
    except ValueError:
        array = np.zeros(0)
    array = array[None] if array.ndim == 3 else array
    whole = array.dtype.kind in "iu" and array.ndim == 4 and array.size and array.shape[3] in (1, 3, 4)
    if not whole or array.min() < 0 or array.max() > 255:
        raise SpecError(
            f"{name}: got {shown(value)}, expected PIL images, uint8 [N, H, W, 3] or float32 [N, channels, H, W] in "
            "[0, 1]"
        )
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
