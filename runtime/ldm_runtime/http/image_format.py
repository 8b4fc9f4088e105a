"""Image formats of answers: PNG, JPEG and WebP."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.images import pil_image

__all__ = ["FORMATS", "ImageFormat"]

FORMATS = ("png", "jpeg", "webp")
DEFAULT_QUALITY = 95


class ImageFormat:
    """A format and its quality.

    Args:
        name: One of ``FORMATS``.
        quality: 0 to 100, for JPEG and WebP.
    """

    def __init__(self, name: str = "png", quality: int = DEFAULT_QUALITY):
        self.name, self.quality = name, quality

    @property
    def media_type(self) -> str:
        """The MIME type."""
        return f"image/{self.name}"

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Encode an image uint8 [H, W, C]; JPEG has no opacity, so RGBA is laid on white for it.

        Raises:
            SpecError: It has neither one, three nor four channels.
        """
        picture = pil_image(image)
        if self.name == "jpeg" and picture.mode == "RGBA":
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        buffer = io.BytesIO()
        picture.save(buffer, self.name.upper(), **({} if self.name == "png" else {"quality": self.quality}))
        return buffer.getvalue()
