"""Quality of images: PSNR and SSIM of two images, and the type of a grader that compares images with their prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Grader = Callable[[Sequence[Picture], Sequence[str]], list[bool] | None]
"""Takes images uint8 [H, W, 3] and one prompt for each; returns which are correct, or None if it cannot grade them."""
_SIGMA, _RADIUS = 1.5, 5


def psnr(one: Picture, other: Picture) -> float | None:
    """Peak signal-to-noise ratio in dB of two uint8 pictures [H, W, 3]; None where they are equal."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return 10 * math.log10(255**2 / error) if error else None


EQUAL = 10 * math.log10(255**2 * 64 * 64 * 3)
"""What a PSNR counts as in a mean where two pictures are equal: one level of one channel of one pixel of 64×64."""


def mean_psnr(values: Sequence[float | None]) -> float:
    """Mean over pictures, equal ones as ``EQUAL``."""
    return float(np.mean([EQUAL if value is None else min(value, EQUAL) for value in values]))


def ssim(one: Picture, other: Picture) -> float:
    """Structural similarity of two uint8 pictures [H, W, 3], at least 11 pixels high and wide.

    Wang et al. 2004: Gaussian window of sigma 1.5 and 11 pixels, K 0.01 and 0.03, mean over places and channels.
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
