"""Micro-conditioning: sizes and crops of the training images, as in Stable Diffusion XL.

Section 2.2 of Podell et al. 2023, arXiv:2307.01952: the model was trained with the original size of each image, the
corner at which it was cropped, and the size to which it was resized.

The unconditional branch has the defaults of diffusers' pipelines. These differ: without a start image, negative sizes
take effect only if both are given; with a start image, each negative size replaces that of the image, and the crop is
always that of the conditional branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.number_checks import integer, shown
from ldm_runtime.request import Request

__all__ = ["MICRO_FIELDS", "MicroConditioner"]

F32 = NDArray[np.float32]
MAX_PIXELS = 2**16
_SIZES = ("original_size", "target_size")
MICRO_FIELDS = (
    *("original_size", "crops_coords_top_left", "target_size"),
    *("negative_original_size", "negative_crops_coords_top_left", "negative_target_size"),
)
"""Fields of ``Request``, each with two numbers of pixels."""
_NEGATIVE_CROP = "negative_crops_coords_top_left"
_ORDER = {"size": "height and width", "left": "top and left"}
"""Last word of a field -> what its two numbers are."""


class MicroConditioner:
    """Provides original size, crop and target size of the images, in pixels.

    Args:
        output: Name of the UNet's input.
    """

    kind: ClassVar[str] = "micro_conditioning"
    fields: ClassVar[frozenset[str]] = frozenset(MICRO_FIELDS)

    def __init__(self, output: str = "time_ids"):
        self._output = output

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> MicroConditioner:
        """Construct from a manifest entry.

        Raises:
            ManifestError: The entry does not name one input.
        """
        if len(spec.inputs) != 1:
            raise ManifestError(f"conditioning: {cls.kind}: got {spec}, expected one input; rebuild the bundle")
        return cls(spec.inputs[0])

    def images(self, request: Request) -> int:
        """Check the sizes and return 1, because they are the same for all images of a request.

        Raises:
            SpecError: A field is not a pair of pixels, or a negative field has no effect because a size is missing.
        """
        for name in self.fields:
            _pair(name, getattr(request, name))
        given = {name for name in self.fields if name.startswith("negative_")} & request.given()
        if request.image is not None:
            if _NEGATIVE_CROP in given:
                raise SpecError(
                    f"{_NEGATIVE_CROP}: got a value beside an image, with which both branches have the crop of "
                    "crops_coords_top_left; leave it out"
                )
            return 1
        if missing := sorted({f"negative_{name}" for name in _SIZES} - given):
            for name in sorted(given):
                raise SpecError(f"{name}: got one without {missing[0]}, which it has no effect without; give both")
        return 1

    def size(self, request: Request) -> tuple[int, int] | None:
        """None: the request decides the size."""
        return None

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Original height and width, top and left of the crop, target height and width: int64 [1, 6] for all images.

        Missing sizes are those of the image, which the planner has filled in.
        """
        image, crop = (request.height, request.width), request.crops_coords_top_left
        sizes = [getattr(request, name) or image for name in _SIZES]
        if branch == "unconditional":
            sizes = [getattr(request, f"negative_{name}") or size for name, size in zip(_SIZES, sizes, strict=True)]
            if request.image is None and request.negative_original_size is not None:
                crop = request.negative_crops_coords_top_left
        original, target = sizes
        return {self._output: np.array([[*original, *crop, *target]], np.int64)}

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def example(self) -> dict[str, Any]:
        """Nothing: the image's own size."""
        return {}

    def close(self) -> None:
        """Nothing to free."""


def _pair(name: str, value: Any) -> None:
    if value is None and not name.endswith("crops_coords_top_left"):
        return
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise SpecError(
            f"{name}: got {shown(value)}, expected two numbers of pixels, {_ORDER[name.rpartition('_')[2]]}"
        )
    for pixels in value:
        integer(name, pixels, 0, MAX_PIXELS)
