"""Masks of images to repaint: 1 where the image is repainted, 0 where it is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.conditioning.image import image_array
from ldm_runtime.errors import SpecError

__all__ = ["binary_mask", "check_mask", "example_mask"]

F32 = NDArray[np.float32]


def binary_mask(given: Any) -> F32:
    """Convert masks of any form of ``image_array`` to float32 [M, 1, H, W]: 1 where at least half white, else 0.

    Raises:
        SpecError: They are not images.
    """
    return np.asarray(image_array("mask", given).mean(axis=1, keepdims=True) >= 0.5, np.float32)


def example_mask(image: F32) -> F32:
    """A mask float32 [1, 1, H, W] whose middle is 1, for images float32 [N, channels, H, W]."""
    height, width = image.shape[2:]
    mask = np.zeros((1, 1, height, width), np.float32)
    mask[:, :, height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 1
    return mask


def check_mask(mask: F32, image: F32) -> None:
    """Check masks float32 [M, 1, H, W] for images float32 [N, channels, …] of the same height and width.

    Raises:
        SpecError: They are empty or full; M is neither 1 nor N.
    """
    flat = mask.reshape(len(mask), -1)
    if not flat.any(axis=1).all():
        raise SpecError("mask: got an empty one, expected white where the image is repainted")
    if flat.all(axis=1).any():
        raise SpecError("mask: got a full one, which leaves nothing of the image; expected black where it is kept")
    if len(mask) not in (1, len(image)):
        raise SpecError(f"mask: got {len(mask)} masks for {len(image)} images, expected one, or one each")
