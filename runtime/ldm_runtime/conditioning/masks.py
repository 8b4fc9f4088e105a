"""Masks of images to repaint: 1 where the image is repainted, 0 where it is kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError

__all__ = ["check_mask"]

F32 = NDArray[np.float32]


def check_mask(mask: F32, image: F32) -> None:
    """Check masks float32 [M, 1, H, W] for images float32 [N, channels, …] whose size has been compared.

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
