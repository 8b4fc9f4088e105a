"""Input images of a request for the report: images, masks and segmentations."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image

from ldm_export.requests import RequestFields
from ldm_runtime.conditioning.image import image_array
from ldm_runtime.conditioning.segmentation import class_array
from ldm_runtime.images import to_pil

__all__ = ["input_images"]

GOLDEN = 0.618
"""Distance between the hues of consecutive classes: the golden ratio, whose multiples are well distributed."""


def input_images(request: RequestFields) -> dict[str, Image.Image]:
    """Return field -> image for the fields of a request that are images; each class of a segmentation gets a colour.

    Raises:
        SpecError: A field is not an image.
    """
    found = {}
    for name in ("image", "mask"):
        if request.get(name) is not None:
            found[name] = to_pil(image_array(name, request[name]))[0]
    if request.get("segmentation") is not None:
        classes = class_array(request["segmentation"])[0]
        colours = [colorsys.hsv_to_rgb(number * GOLDEN % 1, 0.6, 0.9) for number in range(int(classes.max()) + 1)]
        found["segmentation"] = Image.fromarray(np.rint(np.array(colours)[classes] * 255).astype(np.uint8))
    return found
