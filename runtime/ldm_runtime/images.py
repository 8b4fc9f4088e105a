"""Converts image arrays to PIL images, grids and encoded files, and computes PSNR."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import integer, shown

__all__ = ["FORMATS", "check_latents", "grid", "pil_image", "psnr", "to_bytes", "to_pil", "to_png", "to_uint8"]

QUALITY = 95
"""Quality of JPEG and WebP images."""
COMPRESSION = 6
"""Compression level of PNG images, 0 to 9; the pixels are the same at each level."""
CHANNELS = (1, 3, 4)
"""Numbers of channels that PIL supports: L, RGB and RGBA."""
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
"""Suffix of a file -> Pillow's name of its format."""
MAX_COLUMNS = 2**31 - 1
MAX_LATENT = 1e9
"""Largest magnitude of latents, whose usual order is 1. Far larger values overflow in the decoder, and some engines
turn NaN into a black image without an error."""


def check_latents(latents: NDArray[np.float32]) -> None:
    """Check that latents can be decoded to an image.

    Raises:
        SpecError: A value is NaN, or its magnitude is above MAX_LATENT.
    """
    if not (np.abs(latents) <= MAX_LATENT).all():
        raise SpecError(
            f"latents: got up to {np.abs(latents).max():g} after denoising, expected at most {MAX_LATENT:g}; lower "
            "guidance_scale, or use a higher precision"
        )


def to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Convert float [B, C, H, W] in [0, 1] to uint8 [B, H, W, C], rounding half to even as diffusers does.

    Raises:
        SpecError: There are NaN or infinite values, which would otherwise become black.
    """
    if not np.isfinite(images).all():
        raise SpecError("image: the decoder gave NaN or infinite values; build a bundle of higher precision")
    scaled: NDArray[np.float32] = np.clip(images, 0, 1) * np.float32(255)
    return np.rint(scaled).astype(np.uint8).transpose(0, 2, 3, 1)


def to_pil(images: NDArray[np.float32]) -> list[Image.Image]:
    """Convert float [B, C, H, W] in [0, 1] to B PIL images; errors as ``to_uint8`` and ``pil_image``."""
    return [pil_image(image) for image in to_uint8(images)]


def pil_image(image: NDArray[np.uint8]) -> Image.Image:
    """Convert uint8 [H, W, C] to a PIL image: mode L for one channel, RGB for three, RGBA for four.

    Raises:
        SpecError: The number of channels is another.
    """
    channels = image.shape[2]
    if channels not in CHANNELS:
        raise SpecError(f"image: got {channels} channels, expected 1, 3 or 4; use the arrays of the result instead")
    return Image.fromarray(image[:, :, 0] if channels == 1 else image)


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """Arrange equally sized images row by row, ``gap`` white pixels apart; as square as possible by default.

    Raises:
        SpecError: There are no images, or no columns.
    """
    if not images:
        raise SpecError("grid: got no images, expected at least one")
    if columns is not None:
        columns = integer("grid: columns", columns, 1, MAX_COLUMNS)
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    sheet = Image.new(images[0].mode, (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def to_bytes(image: Image.Image, suffix: str, quality: int = QUALITY, compression: int = COMPRESSION) -> bytes:
    """Encode an image in the format of a file name's suffix.

    JPEG and WebP lose detail, because JPEG has no lossless mode and WebP's is slow. For JPEG and BMP, RGBA images get a
    white background, because JPEG has no transparency and few programs read that of BMP.

    Args:
        image: Of mode L, RGB or RGBA.
        suffix: A key of ``FORMATS``, in upper or lower case.
        quality: 0 to 100, for JPEG and WebP.
        compression: 0 to 9, for PNG.

    Raises:
        SpecError: The suffix is of another format, or the format does not take images of this size.
    """
    name = FORMATS.get(suffix.lower())
    if name is None:
        raise SpecError(f"image: got the suffix {shown(suffix)}, expected one of {', '.join(FORMATS)}")
    if name in ("JPEG", "BMP") and image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    buffer = io.BytesIO()
    try:
        image.save(buffer, name, quality=quality, compress_level=compression)
    except (OSError, ValueError) as error:  # Pillow's, e.g. for a side beyond 65535 pixels
        raise SpecError(f"image: {name} does not take {image.mode} {image.size} ({error}); use .png") from None
    return buffer.getvalue()


def to_png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def psnr(one: NDArray[np.float64], other: NDArray[np.float64], peak: float) -> float | None:
    """Peak signal-to-noise ratio in dB of two arrays of one shape; None if they are equal."""
    error = float(np.square(one - other).mean())
    return 10 * math.log10(peak**2 / error) if error else None
