"""Compares two images: SSIM, and the mean of PSNR values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.images import psnr

__all__ = ["EQUAL_PSNR", "Image", "image_psnr", "mean_psnr", "ssim"]

Image = NDArray[np.uint8]
"""uint8 [H, W, 3]."""
EQUAL_PSNR = 100.0
"""Upper bound in dB of the PSNR values in a mean; equal images count as this value."""
_SIGMA, _RADIUS = 1.5, 5


def image_psnr(one: Image, other: Image) -> float | None:
    """PSNR in dB of two images of one shape; None if they are equal."""
    return psnr(one.astype(np.float64), other.astype(np.float64), 255.0)


def mean_psnr(values: Sequence[float | None]) -> float:
    """Mean PSNR over images; equal images (None) count as ``EQUAL_PSNR``."""
    return float(np.mean([EQUAL_PSNR if value is None else min(value, EQUAL_PSNR) for value in values]))


def ssim(one: Image, other: Image) -> float:
    """Structural similarity of two images of one shape, at least 11 pixels high and wide.

    Wang et al. 2004: Gaussian window of sigma 1.5 and 11 pixels, K1 0.01 and K2 0.03, mean over positions and channels.
    """
    x, y = one.astype(np.float64), other.astype(np.float64)
    mx, my = _blurred(x), _blurred(y)
    vx, vy, cov = _blurred(x * x) - mx * mx, _blurred(y * y) - my * my, _blurred(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


def _blurred(image: NDArray[np.float64]) -> NDArray[np.float64]:
    window = np.exp(-np.square(np.arange(-_RADIUS, _RADIUS + 1)) / (2 * _SIGMA**2))
    window /= window.sum()
    for axis in (0, 1):
        views = np.lib.stride_tricks.sliding_window_view(image, len(window), axis=axis)
        image = views @ window
    return image
