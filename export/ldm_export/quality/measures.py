"""Measures for comparing two results (relative error, cosine and PSNR), and the tolerance of each precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.images import psnr

__all__ = ["TOLERANCES", "ComponentResult", "Tolerance", "compared"]


@dataclass(frozen=True)
class Tolerance:
    """Bounds for a comparison.

    Attributes:
        component: Maximum error of a component, relative to its largest value.
        pixel: Maximum difference of a pixel, in 1/255.
        psnr: Minimum PSNR of an image, in dB.
    """

    component: float
    pixel: int
    psnr: float


TOLERANCES = {
    "fp32": Tolerance(component=1e-3, pixel=1, psnr=0),
    "fp16": Tolerance(component=0.02, pixel=255, psnr=45),
    "bf16": Tolerance(component=0.1, pixel=255, psnr=30),
    "int8": Tolerance(component=0.5, pixel=255, psnr=25),
}
"""Default tolerance of each precision: fp32 reproduces the image, the others come close to it."""


@dataclass(frozen=True)
class ComponentResult:
    """Difference between the results of a component and the expected ones for the same inputs.

    Attributes:
        name: Name of the component.
        max_error: Largest |error| divided by the largest expected |value|.
        cosine: Cosine between the two.
        psnr: In dB; None if the two are equal.
    """

    name: str
    max_error: float
    cosine: float
    psnr: float | None


def compared(name: str, actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> ComponentResult:
    """Compare outputs with expected ones of the same names and shapes. Several outputs are compared as one vector."""
    one, other = (
        np.concatenate([np.asarray(outputs[key], np.float64).ravel() for key in expected])
        for outputs in (actual, expected)
    )
    scale = float(np.abs(other).max()) or 1.0
    cosine = float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other) or 1.0))
    return ComponentResult(name, float(np.abs(one - other).max()) / scale, cosine, psnr(one, other, scale))
