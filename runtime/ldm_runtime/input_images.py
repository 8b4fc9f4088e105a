"""Reads image files within limits, and converts images to RGB."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ldm_runtime.errors import SpecError

__all__ = ["MAX_PIXELS", "open_image", "rgb_image"]

MAX_PIXELS = 2**25
"""Maximum pixels of an image file, 33.5 million: more than any model takes, and 100 MB when decoded."""
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def open_image(file: Path | BinaryIO, name: str | None = None) -> Image.Image:
    """Read an image file and rotate it by its EXIF orientation; its mode is not changed.

    Its size is checked before it is decoded. For images of more than 89 million pixels, which are refused, Pillow also
    warns. The warning is not suppressed, because warning filters are shared by all threads.

    Args:
        file: Path, or an open file.
        name: Name of the image in error messages; by default the path.

    Raises:
        SpecError: The file is missing, is not an image, or is too large, animated or truncated.
    """
    shown_as = str(file) if name is None else name
    try:
        with Image.open(file) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise _refused(shown_as, f"{width} x {height} pixels", f"at most {MAX_PIXELS} pixels; make it smaller")
            frames = getattr(opened, "n_frames", 1)
            if frames != 1:
                raise _refused(shown_as, f"{frames} frames", "a single image; save one frame")
            opened.load()
            return ImageOps.exif_transpose(opened)
    except SpecError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # a warning if the caller raises warnings
        raise _refused(shown_as, "more pixels than Pillow opens", f"at most {MAX_PIXELS}; make it smaller") from None
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        cause = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise SpecError(f"{shown_as}: cannot be read as an image ({cause:.160}); give a PNG or JPEG") from None


def rgb_image(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, rotated by its EXIF orientation.

    Palette indices become colours, 16-bit values are scaled, and transparent images get a white background.

    Raises:
        SpecError: It has more than ``MAX_PIXELS`` pixels.
    """
    if image.width * image.height > MAX_PIXELS:
        raise SpecError(f"image: got {image.width} x {image.height} pixels, expected at most {MAX_PIXELS}")
    image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image, np.float64)
        return Image.fromarray(np.rint(np.clip(values / 257, 0, 255)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.rint(np.clip(np.asarray(image), 0, 255)).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _refused(name: str, got: str, expected: str) -> SpecError:
    return SpecError(f"{name}: got {got}, expected {expected}")
