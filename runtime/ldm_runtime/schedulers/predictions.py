"""Prediction types: weights of x and the prediction in x0 and in the noise, where x = √ᾱ·x0 + √(1-ᾱ)·noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["noise_weights", "x0_weights"]

F64 = NDArray[np.float64]


def x0_weights(prediction_type: str, sqrt_alpha: F64, sqrt_beta: F64) -> F64:
    """Return the weights of x and prediction in x0, float64 [n, 2].

    Args:
        prediction_type: "epsilon", "sample" or "v_prediction".
        sqrt_alpha: √ᾱ, float64 [n].
        sqrt_beta: √(1-ᾱ), float64 [n].
    """
    if prediction_type == "epsilon":
        return np.stack([1 / sqrt_alpha, -sqrt_beta / sqrt_alpha], axis=1)
    if prediction_type == "sample":
        return np.stack([np.zeros_like(sqrt_alpha), np.ones_like(sqrt_alpha)], axis=1)
    return np.stack([sqrt_alpha, -sqrt_beta], axis=1)


def noise_weights(prediction_type: str, sqrt_alpha: F64, sqrt_beta: F64) -> F64:
    """Return the weights of x and prediction in the noise, float64 [n, 2]; arguments as in ``x0_weights``."""
    if prediction_type == "epsilon":
        return np.stack([np.zeros_like(sqrt_alpha), np.ones_like(sqrt_alpha)], axis=1)
    if prediction_type == "sample":
        return np.stack([1 / sqrt_beta, -sqrt_alpha / sqrt_beta], axis=1)
    return np.stack([sqrt_beta, sqrt_alpha], axis=1)
