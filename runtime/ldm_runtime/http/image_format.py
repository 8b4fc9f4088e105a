"""Image formats of answers: PNG, JPEG and WebP."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.images import QUALITY, pil_image, to_bytes

__all__ = ["FORMATS", "ImageFormat"]

FORMATS = ("png", "jpeg", "webp")
FAST_COMPRESSION = 1
"""Compression level of PNG images in answers: half the time of the default level, for about a sixth more bytes."""


class ImageFormat:
    """A format and its quality.

    Args:
        name: One of ``FORMATS``.
        quality: 0 to 100, for JPEG and WebP.
    """

    def __init__(self, name: str = "png", quality: int = QUALITY):
        self.name, self.quality = name, quality

    @property
    def media_type(self) -> str:
        """The MIME type."""
        return f"image/{self.name}"

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Encode an image uint8 [H, W, C]. JPEG has no transparency, so RGBA images get a white background.

        Raises:
            SpecError: It has neither one, three nor four channels.
        """
        return to_bytes(pil_image(image), f".{self.name}", self.quality, FAST_COMPRESSION)
