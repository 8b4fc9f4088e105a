"""How close two pictures are: PSNR and SSIM; and how many pictures are as their prompts say."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.shapes.drawing import PIXELS
from ldm_calibration.shapes.grader import grade
from ldm_calibration.shapes.grammar import parse

Picture = NDArray[np.uint8]
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


def right(pictures: Sequence[Picture], prompts: Sequence[str]) -> list[bool] | None:
    """Which pictures are as their prompts say, by the shapes grader; None where it cannot grade them."""
    try:
        sentences = [parse(prompt) for prompt in prompts]
    except ValueError:
        return None
    if any(picture.shape != (PIXELS, PIXELS, 3) for picture in pictures):
        return None
    return [grade(picture, sentence).right for picture, sentence in zip(pictures, sentences, strict=True)]
