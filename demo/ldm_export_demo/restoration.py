"""Grades images of the super-resolution and the inpainting model against the original; no part of it is learned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_export_demo.grader import MAX_LEFTOVERS
from ldm_export_demo.inputs import MaskedImage
from ldm_export_demo.reader import FoundObject, Reading, read

__all__ = ["InpaintingGrade", "filled", "grade_inpainting", "psnr", "shows_the_same"]

MAX_SHIFT = 2.0
"""Maximum distance between the centres of the same object in two images, in pixels."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class InpaintingGrade:
    """Properties of an image in which the masked part was redrawn.

    Attributes:
        unchanged: Outside of the mask every pixel is the original's.
        continued: The background is the original's, and no pixel is left unexplained.
        redrawn: There are as many objects as before, each of a known colour, shape and size. Where the mask hid a part
            of an object, its colour, shape and size are those of the original, and it is at the same place.
    """

    unchanged: bool
    continued: bool
    redrawn: bool

    @property
    def correct(self) -> bool:
        """True if the image has every property."""
        return self.unchanged and self.continued and self.redrawn


def psnr(image: Pixels, original: Pixels) -> float:
    """Peak signal-to-noise ratio of two images, uint8 [H, W, 3], in dB; infinite for equal images."""
    error = np.mean((image.astype(np.float64) - original) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def shows_the_same(image: Pixels, original: Pixels) -> bool:
    """True if an image, uint8 [64, 64, 3], has the background and the objects of the original at their places."""
    found, expected = read(image), read(original)
    return _continued(found, expected) and _same_objects(found, expected)


def grade_inpainting(image: Pixels, given: MaskedImage) -> InpaintingGrade:
    """Grade an image, uint8 [64, 64, 3], in which the masked part of another was redrawn."""
    outside = given.mask == 0
    found, expected = read(image), read(given.image)
    redrawn = all(None not in (one.colour, one.shape, one.size) for one in found.objects)
    if given.kind == "part":
        redrawn = redrawn and _same_objects(found, expected)
    else:
        redrawn = redrawn and len(found.objects) == len(expected.objects)
    unchanged = bool((image == given.image)[outside].all())
    return InpaintingGrade(unchanged, _continued(found, expected), redrawn)


def filled(given: MaskedImage) -> Pixels:
    """The image with the masked part in the colour of the background: what a fill without a model gives."""
    ground = np.median(given.image[given.mask == 0], axis=0).astype(np.uint8)
    return np.where(given.mask[..., None] == 0, given.image, ground)


def _continued(found: Reading, expected: Reading) -> bool:
    return found.background == expected.background and found.leftovers <= MAX_LEFTOVERS


def _same_objects(found: Reading, expected: Reading) -> bool:
    everything = all(any(_same(one, other) for one in found.objects) for other in expected.objects)
    return everything and len(found.objects) == len(expected.objects)


def _same(one: FoundObject, other: FoundObject) -> bool:
    near = np.hypot(one.x - other.x, one.y - other.y) <= MAX_SHIFT
    return bool(near) and (one.colour, one.shape, one.size) == (other.colour, other.shape, other.size)
