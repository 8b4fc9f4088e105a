"""Coefficients of UniPC's predictor and corrector, by the formulas of diffusers' UniPCMultistepScheduler in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["UniPCStep", "corrector", "predictor"]

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class UniPCStep:
    """A step from one noise level to another.

    Args:
        levels: alpha, sigma and lambda of the target, of the start, and of the levels before it, the latest first;
            float64 [3, order + 1], see ``dpm_solver_rows.noise_levels``.
        predict_x0: True if the solver integrates x0, False for noise.
        solver_type: "bh1" or "bh2".
    """

    levels: F64
    predict_x0: bool
    solver_type: str

    @property
    def of_x(self) -> np.float64:
        """Weight of x at the start."""
        alpha, sigma, _ = self.levels
        return np.float64(sigma[0] / sigma[1] if self.predict_x0 else alpha[0] / alpha[1])

    @property
    def scale(self) -> np.float64:
        """Factor of the model values."""
        return np.float64(self.levels[0 if self.predict_x0 else 1, 0])

    @property
    def length(self) -> np.float64:
        """Difference of lambda, negative for x0."""
        h = self.levels[2, 0] - self.levels[2, 1]
        return np.float64(-h if self.predict_x0 else h)

    @property
    def divisor(self) -> np.float64:
        """B(h) of the paper."""
        return self.length if self.solver_type == "bh1" else np.float64(np.expm1(self.length))

    @property
    def ratios(self) -> F64:
        """Distances of earlier levels from the start, relative to the step's length, followed by 1; float64 [order]."""
        lambdas = self.levels[2]
        return np.append((lambdas[2:] - lambdas[1]) / (lambdas[0] - lambdas[1]), 1.0)

    def equations(self) -> tuple[F64, F64]:
        """R and b of the paper, float64 [order, order] and [order]."""
        order, length = self.levels.shape[1] - 1, self.length
        phi, factorial, right = np.expm1(length) / length - 1, 1, []
        for i in range(1, order + 1):
            right.append(phi * factorial / self.divisor)
            factorial *= i + 1
            phi = phi / length - 1 / factorial
        return np.stack([self.ratios**i for i in range(order)]), np.array(right)


def predictor(step: UniPCStep) -> tuple[np.float64, F64]:
    """Return the weights of x and of the model values at the start and at the levels before it, float64 [order]."""
    order = step.levels.shape[1] - 1
    shares = np.full(order - 1, 0.5)
    if order > 2:
        left, right = step.equations()
        shares = _solved(left[:-1, :-1], right[:-1])
    return step.of_x, _weights(step, shares, np.float64(0))


def corrector(step: UniPCStep) -> tuple[np.float64, F64, np.float64]:
    """Return the weights of x, of the model values as in ``predictor``, and of the model value at the target."""
    order = step.levels.shape[1] - 1
    shares = np.array([0.5]) if order == 1 else _solved(*step.equations())
    return step.of_x, _weights(step, shares[:-1], shares[-1]), -step.scale * step.divisor * shares[-1]


def _weights(step: UniPCStep, shares: F64, of_target: np.float64) -> F64:
    """Weights of the model values; ``shares`` weight the differences to earlier values and to the target's."""
    differences = shares / step.ratios[:-1]
    first = np.expm1(step.length) - step.divisor * (differences.sum() + of_target)
    return -step.scale * np.append(first, step.divisor * differences)


def _solved(left: F64, right: F64) -> F64:
    try:
        return np.asarray(np.linalg.solve(left, right), np.float64)
    except np.linalg.LinAlgError:
        return np.full_like(right, np.nan)
