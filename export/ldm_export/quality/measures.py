"""How two results are compared: largest error as a share of the scale, cosine and PSNR, and what is accepted."""

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
    """What is accepted: ``component`` as a share of the largest value, ``pixel`` in 1/255 at most, ``psnr`` in dB."""

    component: float
    pixel: int
    psnr: float


TOLERANCES = {
    "fp32": Tolerance(component=1e-3, pixel=1, psnr=0),
    "fp16": Tolerance(component=0.02, pixel=255, psnr=45),
    "bf16": Tolerance(component=0.1, pixel=255, psnr=30),
    "int8": Tolerance(component=0.5, pixel=255, psnr=25),
}
"""What is accepted of each precision by default: fp32 gives the same image, the others one close to it."""


@dataclass(frozen=True)
class ComponentResult:
    """Results of one component against the expected ones for the same inputs.

    Attributes:
        name: Of the component.
        max_error: Largest |error| as a share of the largest |value| expected.
        cosine: Cosine between the two.
        psnr: In dB; None where the two are equal.
    """

    name: str
    max_error: float
    cosine: float
    psnr: float | None


def compared(name: str, got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> ComponentResult:
    """Compare outputs with the expected ones of the same names and shapes; several outputs count as one vector."""
    one, other = (
        np.concatenate([np.asarray(outputs[key], np.float64).ravel() for key in expected])
        for outputs in (got, expected)
    )
    scale = float(np.abs(other).max()) or 1.0
    cosine = float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other) or 1.0))
    return ComponentResult(name, float(np.abs(one - other).max()) / scale, cosine, psnr(one, other, scale))
