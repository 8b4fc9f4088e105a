"""Coefficients of one DPM-Solver update, by the formulas of diffusers' DPMSolverMultistepScheduler in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["model_value", "noise_levels", "update", "x0_weights"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def noise_levels(sigmas: F32) -> F64:
    """Return alpha (signal), sigma (noise) and lambda (log of their ratio) of each noise level.

    Args:
        sigmas: Ratio of noise to signal, float32 [n]; 0 gives an infinite lambda.

    Returns:
        float64 [3, n].
    """
    ratio = sigmas.astype(np.float64)
    alpha = 1 / np.sqrt(ratio**2 + 1)
    with np.errstate(divide="ignore"):
        return np.stack([alpha, ratio * alpha, -np.log(ratio)])


def x0_weights(prediction_type: str, levels: F64, calls: int) -> F64:
    """Return the weights of x and prediction in x0 at each call, float64 [calls, 2]."""
    alpha, sigma, _ = levels[:, :calls]
    if prediction_type == "epsilon":
        return np.stack([1 / alpha, -sigma / alpha], axis=1)
    if prediction_type == "sample":
        return np.stack([np.zeros_like(alpha), np.ones_like(alpha)], axis=1)
    return np.stack([alpha, -sigma], axis=1)


def model_value(algorithm: str, thresholding: bool, slots: int, level: F64, x0_weights: F64) -> F64:
    """Return the weights of the value that the solver integrates: x0 for "++", else noise.

    Args:
        algorithm: As in ``update``.
        thresholding: True if x0 is thresholded, so that it has a column of its own.
        slots: Number of arrays in the state.
        level: alpha, sigma and lambda of the call, float64 [3].
        x0_weights: Weights of x and prediction in x0, float64 [2].

    Returns:
        float64 [slots + 3] over the columns of ``Trajectory.rows``.
    """
    value = np.zeros(slots + 3)
    if thresholding:
        value[slots + 1] = 1
    else:
        value[0], value[slots] = x0_weights
    if algorithm.endswith("++"):
        return value
    alpha, sigma, _ = level
    value *= -alpha / sigma
    value[0] = 1 / sigma if thresholding else (1 - alpha * x0_weights[0]) / sigma
    return value


def update(algorithm: str, solver_type: str, order: int, levels: F64) -> tuple[float, float, F64]:
    """Return the weights of one update of order 1, 2 or 3.

    Args:
        algorithm: "dpmsolver++", "dpmsolver", "sde-dpmsolver++" or "sde-dpmsolver" (not of order 3).
        solver_type: "midpoint" or "heun", for order 2.
        order: Number of model values that the update uses.
        levels: Result of ``noise_levels``, float64 [3, order + 1 or more]. The last column is the target of the update,
            the one before it the current level, those before it earlier levels.

    Returns:
        The weights of x, of noise, and of the model values m (x0 for "++", else noise), latest first, float64 [order].
    """
    (alpha_s, sigma_s, lambda_s), (alpha, sigma, lambda_t) = levels[:, -2], levels[:, -1]
    h = lambda_t - lambda_s
    of_x, of_noise, of_d = _integrals(algorithm, (alpha_s, sigma_s, alpha, sigma), h)
    d0 = np.eye(3)[0]
    if order == 1:
        return of_x, of_noise, of_d[0] * d0[:1]
    h_0 = lambda_s - levels[2, -3]
    d1 = h / h_0 * np.array([1.0, -1.0, 0.0])
    if order == 2:
        of_d1 = of_d[0] / 2 if solver_type == "midpoint" else of_d[1]
        return of_x, of_noise, (of_d[0] * d0 + of_d1 * d1)[:2]
    h_1 = levels[2, -3] - levels[2, -4]
    d1_1 = h / h_1 * np.array([0.0, 1.0, -1.0])
    d2 = h / (h_0 + h_1) * (d1 - d1_1)
    d1 = d1 + h_0 / (h_0 + h_1) * (d1 - d1_1)
    return of_x, of_noise, of_d[0] * d0 + of_d[1] * d1 + of_d[2] * d2


def _integrals(
    algorithm: str, ends: tuple[np.float64, np.float64, np.float64, np.float64], h: np.float64
) -> tuple[float, float, list[np.float64]]:
    """Weights of x and noise, and of the model value and its first two differences (heun, order 3).

    A step of length ``h`` 0 has zero weights for the differences, the limit, instead of diffusers' 0 / 0.
    """
    alpha_s, sigma_s, alpha, sigma = ends
    zero = np.float64(0)
    if algorithm == "dpmsolver++":
        e = np.expm1(-h)
        weights = [-alpha * e, alpha * (e / h + 1), -alpha * ((e + h) / h**2 - 0.5)]
        of_x, of_noise = sigma / sigma_s, zero
    elif algorithm == "dpmsolver":
        e = np.expm1(h)
        weights = [-sigma * e, -sigma * (e / h - 1), -sigma * ((e - h) / h**2 - 0.5)]
        of_x, of_noise = alpha / alpha_s, zero
    elif algorithm == "sde-dpmsolver++":
        e = -np.expm1(-2 * h)
        weights = [alpha * e, alpha * (1 - e / (2 * h)), alpha * ((e - 2 * h) / (2 * h) ** 2 - 0.5)]
        of_x, of_noise = sigma / sigma_s * np.exp(-h), sigma * np.sqrt(_rounded(e))
    else:
        e = np.expm1(h)
        weights = [-2 * sigma * e, -2 * sigma * (e / h - 1), zero]
        of_x, of_noise = alpha / alpha_s, sigma * np.sqrt(_rounded(np.expm1(2 * h)))
    return float(of_x), float(of_noise), [weights[0], zero, zero] if h == 0 else weights


def _rounded(variance: np.float64) -> np.float64:
    """Replace a negative variance, a rounding error of two equal noise levels, by zero."""
    return np.float64(0) if -1e-6 < variance < 0 else variance
