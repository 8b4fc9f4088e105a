"""Linear multistep method (Katherine Crowson's k-diffusion) as diffusers' LMSDiscreteScheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.schedulers.sigma_schedule import ResampledSigmas
from ldm_runtime.schedulers.trajectory import Trajectory

__all__ = ["LMS"]

F64 = NDArray[np.float64]

ORDER = 4
"""Number of slopes that a step combines; diffusers' pipelines always use this default."""
NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(2)
"""Nodes and weights of Gaussian quadrature, exact for polynomials of degree 3."""


@dataclass(frozen=True)
class LMS(ResampledSigmas):
    """Configuration of an LMSDiscreteScheduler; names, meanings and defaults are those of diffusers 0.42.

    Raises:
        SpecError: Names the option, the value and the expected values.
    """

    CLASS: ClassVar[str] = "LMSDiscreteScheduler"
    KARRAS_LIMITS: ClassVar[bool] = False

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory. Its state is x and the last three slopes, the latest first.

        Args:
            num_inference_steps: 1..num_train_timesteps.
            eta: Ignored; the method is deterministic.

        Raises:
            SpecError: The number of steps is out of range, or two of the last sigmas are equal.
        """
        steps = self.steps(num_inference_steps)
        sigmas, calls = steps.sigmas.astype(np.float64), len(steps.timesteps)
        rows = np.zeros((calls, ORDER, ORDER + 3))
        with np.errstate(all="ignore"):  # non-finite values are refused below
            slope = self.slope_weights(sigmas[:calls])
            for i in range(calls):
                weights = _weights(sigmas[max(i - ORDER + 1, 0) : i + 2])
                rows[i, 0, [0, ORDER]] = weights[0] * slope[i]
                rows[i, 0, 1 : len(weights)] = weights[1:]
                rows[i, 0, 0] += 1
                rows[i, 1, [0, ORDER]] = slope[i]
        for slot in range(2, ORDER):
            rows[:, slot, slot - 1] = 1
        return self._trajectory(steps, steps, rows)


def _weights(sigmas: F64) -> F64:
    """Weights of the slopes at all sigmas but the last, latest first: integrals of the Lagrange polynomials.

    Args:
        sigmas: float64 [order + 1], descending; the integrals run from the last but one to the last.
    """
    knots, middle, half = sigmas[-2::-1], (sigmas[-2] + sigmas[-1]) / 2, (sigmas[-1] - sigmas[-2]) / 2
    at = middle + half * NODES
    weights = []
    for k, knot in enumerate(knots):
        others = np.delete(knots, k)
        weights.append(half * NODE_WEIGHTS @ np.prod((at[:, None] - others) / (knot - others), axis=1))
    return np.array(weights)
