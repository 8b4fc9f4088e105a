"""Segmentation conditioning: a class for every pixel of the image, encoded by a component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.image_sizes import check_sides, fitted, latent_sides, report_fitted
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.number_checks import shown
from ldm_runtime.request import Request

__all__ = ["CLASS_MODES", "SegmentationConditioner", "class_array"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
CLASS_MODES = ("1", "L", "P", "I", "I;16")
"""Modes of PIL images with one number per pixel; in a palette image it is the index, not the colour."""


class SegmentationConditioner:
    """Encodes images of class numbers.

    Args:
        backend: The encoder: ``segmentation`` int64 [N, H, W] -> ``output`` float32 [N, C, h, w].
        output: Name of the encoder's output tensor, which is the UNet's input.
        classes: Number of classes a request may name.
    """

    kind: ClassVar[str] = "segmentation"
    fields: ClassVar[frozenset[str]] = frozenset({"segmentation", "images_per_prompt"})

    def __init__(self, backend: Backend, output: str, classes: int):
        self._backend, self._output, self.classes = backend, output, classes

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> SegmentationConditioner:
        """Construct from a manifest entry with the setting "classes".

        Raises:
            ManifestError: The encoder is missing or of another form, or the setting is missing.
        """
        if spec.component not in backends or len(spec.inputs) != 1 or spec.settings.get("classes", 0) < 1:
            raise ManifestError(f"conditioning: segmentation: got {spec}, expected an encoder and classes; rebuild it")
        backend = backends[spec.component]
        got = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in backend.inputs]
        if got != [("segmentation", "int64", 3)]:
            raise ManifestError(
                f"{spec.component}: inputs are {got}, expected segmentation int64 [N, H, W]; rebuild it"
            )
        return cls(backend, spec.inputs[0], spec.settings["classes"])

    def images(self, request: Request) -> int:
        """Check the class images and return their number, times ``images_per_prompt``.

        Raises:
            SpecError: There are none, they are no supported type, have a size that the model does not take, or contain
                an unknown class.
        """
        if request.segmentation is None:
            raise SpecError(
                f"segmentation: got none, expected an image of class numbers from 0 to {self.classes - 1}; this model "
                "draws from segmentations"
            )
        array = self._array(request)
        report_fitted("segmentation", request.segmentation, array)
        return len(array) * request.repeats()

    def size(self, request: Request) -> tuple[int, int] | None:
        """Height and width of the latents, from those of the class images."""
        return latent_sides(self._array(request).shape[1:], self._backend.inputs[0].shape[1:])

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """The encoded classes float32 [images, C, h, w], the same for every branch.

        Raises:
            BackendError: The engine failed.
        """
        array = self._array(request)
        found = [self._backend.run({"segmentation": array[i : i + 1]})[self._output] for i in range(len(array))]
        return {self._output: np.repeat(np.concatenate(found), request.images_per_prompt, axis=0)}

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def example(self) -> dict[str, Any]:
        """Two by two rectangles of the first four classes, in the model's size."""
        _, height, width = self._backend.inputs[0].bounds("opt")
        down, across = np.arange(height)[:, None] * 2 // height, np.arange(width)[None, :] * 2 // width
        return {"segmentation": (2 * down + across)[None] % self.classes}

    def close(self) -> None:
        """Free the encoder."""
        self._backend.close()

    def _array(self, request: Request) -> I64:
        dims = self._backend.inputs[0].shape[1:]
        array = class_array(fitted(request.segmentation, dims, 1, Image.Resampling.NEAREST))
        check_sides("segmentation", array.shape[1:], dims)
        if array.min() < 0 or array.max() >= self.classes:
            wrong = int(array.min() if array.min() < 0 else array.max())
            raise SpecError(f"segmentation: got class {wrong}, expected 0 to {self.classes - 1}; renumber the classes")
        return array


def class_array(given: Any) -> I64:
    """Convert class images in any supported form to int64 [N, H, W].

    Args:
        given: A PIL image with one number per pixel, a list of them, or whole numbers [H, W] or [N, H, W].

    Raises:
        SpecError: The type is not supported, or the images have different sizes.
    """
    images = [given] if isinstance(given, Image.Image) else given
    if isinstance(images, list | tuple) and images and all(isinstance(one, Image.Image) for one in images):
        if colour := [one.mode for one in images if one.mode not in CLASS_MODES]:
            raise SpecError(
                f"segmentation: got an image of mode {colour[0]}, expected one class number per pixel (mode L or P); "
                "save it with classes instead of colours"
            )
        if len({one.size for one in images}) != 1:
            raise SpecError("segmentation: got images of different sizes, expected one size; make several calls")
        images = np.stack([np.asarray(one) for one in images])
    try:
        array = np.asarray(images)
    except ValueError:
        array = np.zeros(0)
    array = array[None] if array.ndim == 2 else array
    if array.dtype.kind not in "iub" or array.ndim != 3 or not array.size:
        raise SpecError(f"segmentation: got {shown(given)}, expected whole numbers [H, W] or [N, H, W], or PIL images")
    return array.astype(np.int64)
