"""Spacings of noise levels and timesteps for DPM-Solver, as diffusers computes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["beta_quantile", "beta_sigmas", "exponential_sigmas", "karras_sigmas", "sigma_timesteps", "solver_timesteps"]

F64 = NDArray[np.float64]

KARRAS_RHO = 7.0
BETA_SHAPE = 0.6  # both shape parameters of the beta distribution


def karras_sigmas(low: float, high: float, steps: int) -> F64:
    """Return ``steps`` descending sigmas by equation (5) of Karras et al. 2022 (arXiv:2206.00364); float64."""
    first, last = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    return np.asarray((first + np.linspace(0, 1, steps) * (last - first)) ** KARRAS_RHO, np.float64)


def exponential_sigmas(low: float, high: float, steps: int) -> F64:
    """Return ``steps`` descending sigmas with evenly spaced logarithms; float64."""
    return np.asarray(np.exp(np.linspace(math.log(high), math.log(low), steps)), np.float64)


def beta_sigmas(low: float, high: float, steps: int) -> F64:
    """Return ``steps`` descending sigmas at quantiles of the beta distribution (arXiv:2407.12173); float64."""
    return low + beta_quantile(1 - np.linspace(0, 1, steps)) * (high - low)


def beta_quantile(p: F64) -> F64:
    """Return the quantiles of the beta distribution with both shape parameters 0.6.

    The distribution function is a power series up to the median, inverted by bisection; the upper half is the mirror
    image of the lower.

    Args:
        p: Probabilities in [0, 1], float64 [n].
    """
    order = np.arange(64)
    factors = np.cumprod(np.concatenate([[1.0], (order[:-1] + 1 - BETA_SHAPE) / (order[:-1] + 1)]))
    norm = math.gamma(BETA_SHAPE) ** 2 / math.gamma(2 * BETA_SHAPE)
    coefficients = (factors / (BETA_SHAPE + order) / norm)[::-1]  # of x^63 first
    target = np.minimum(p, 1 - p)
    low, high = np.zeros_like(target), np.full_like(target, 0.5)
    for _ in range(64):
        middle = (low + high) / 2
        below = middle**BETA_SHAPE * np.polyval(coefficients, middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    quantile = np.where(target > 0, (low + high) / 2, 0.0)
    return np.asarray(np.where(p > 0.5, 1 - quantile, quantile), np.float64)


def sigma_timesteps(sigmas: F64, log_sigmas: NDArray[np.float32]) -> F64:
    """Return the timestep of each sigma by linear interpolation of the logarithms; float64 [n], not rounded.

    Args:
        sigmas: Noise levels, float64 [n].
        log_sigmas: Logarithm of the sigma of every training timestep, float32 [num_train_timesteps], two or more.
    """
    timesteps, knots = [], log_sigmas.astype(np.float64)
    for sigma in np.maximum(sigmas, 1e-10):
        log_sigma = np.log(sigma)  # of scalars, as in diffusers: NumPy rounds those of arrays differently
        not_above = np.flatnonzero(knots <= log_sigma)
        low = min(int(not_above[-1]) if len(not_above) else 0, len(log_sigmas) - 2)
        gap = np.float64(log_sigmas[low] - log_sigmas[low + 1])  # rounded to float32, as in diffusers
        weight = np.clip((knots[low] - log_sigma) / gap, 0, 1)
        timesteps.append((1 - weight) * low + weight * (low + 1))
    return np.array(timesteps, np.float64)


def solver_timesteps(spacing: str, count: int, end: int, steps: int, offset: int) -> NDArray[np.int64]:
    """Return descending timesteps as DPM-Solver spaces them. Unlike DDIM's, they do not include timestep 0.

    Args:
        spacing: "leading", "linspace" or "trailing".
        count: Number of training timesteps.
        end: Number of training timesteps to use, from the first on.
        steps: Number of inference steps.
        offset: Added to the timesteps of "leading".

    Returns:
        int64 [steps]; with "trailing" one more because of rounding, the last of them -1, or fewer if ``end < count``.
    """
    if spacing == "linspace":
        timesteps: NDArray[Any] = np.linspace(0, end - 1, steps + 1).round()[::-1][:-1]
    elif spacing == "leading":
        timesteps = np.arange(steps + 1)[::-1][:-1] * (end // (steps + 1)) + offset
    else:
        timesteps = np.arange(end, 0, -(count / steps)).round() - 1
    return timesteps.astype(np.int64)
