"""Quantization of weights: symmetric int8 with one scale for each output channel."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["LEVELS", "quantize_weights", "smoothing_factors", "weights_of"]

LEVELS = 127
"""Symmetric int8 uses the values -127 to 127 and zero point 0; TensorRT accepts no other zero point."""


def weights_of(value: ir.Value) -> NDArray[np.float32]:
    """Return a copy of the values of an initializer."""
    assert value.const_value is not None
    return np.array(value.const_value.numpy())


def quantize_weights(weights: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize float32 weights.

    Returns:
        int8 weights of the same shape, from -127 to 127, and float32 scales, one for each slice along ``axis``. A slice
            of zeros has scale 1.
    """
    others = tuple(i for i in range(weights.ndim) if i != axis)
    largest = np.abs(weights).max(others, keepdims=True)
    scales = np.where(largest > 0, largest / np.float32(LEVELS), np.float32(1)).astype(np.float32)
    return np.clip(np.rint(weights / scales), -LEVELS, LEVELS).astype(np.int8), scales.reshape(-1)


def smoothing_factors(
    activations: NDArray[np.float32], weights: NDArray[np.float32], exponent: float
) -> NDArray[np.float32]:
    """Return the factors by which activations are divided and weights are multiplied, float32 [input channels].

    SmoothQuant (Xiao et al. 2022, arXiv:2211.10438, equation 4): max|X|^a / max|W|^(1-a), here with a geometric mean
    of 1.

    Args:
        activations: Largest magnitude of each input channel of the activations.
        weights: Largest magnitude of the weights that read each input channel.
        exponent: a in [0, 1]; 0 returns factors of 1.
    """
    if not exponent:
        return np.ones_like(activations)
    floor = np.float32(1e-5)
    x = np.maximum(activations, floor * max(float(activations.max()), 1e-30))
    w = np.maximum(weights, floor * max(float(weights.max()), 1e-30))
    logs = exponent * np.log(x.astype(np.float64)) - (1 - exponent) * np.log(w.astype(np.float64))
    return np.asarray(np.exp(np.clip(logs - logs.mean(), -8, 8)), np.float32)
