"""One DDIM trajectory: its timesteps and what each step multiplies and adds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Schedule:
    """What DDIM.schedule gives. Arrays are read-only; ``timesteps`` int64 [steps], falling; the others float32 [steps].

    Args:
        prediction_type: what the model puts out: "epsilon", "sample" or "v_prediction".
        clip: x_0 is clipped to ± this (None: not).
        threshold: (quantile, highest bound) of dynamic thresholding (None: off), which takes the place of ``clip``.
        eta: 0 is deterministic DDIM, 1 as noisy as DDPM.
        signal, spread: √ᾱ_t and √(1 - ᾱ_t).
        signal_prev, direction, sigma: √ᾱ_prev, √(1 - ᾱ_prev - σ²) and σ, the weights of x_0, epsilon and noise.
    """

    prediction_type: str
    clip: float | None
    threshold: tuple[float, float] | None
    eta: float
    timesteps: NDArray[np.int64]
    signal: F32
    spread: F32
    signal_prev: F32
    direction: F32
    sigma: F32

    def __post_init__(self) -> None:
        for array in (self.timesteps, self.signal, self.spread, self.signal_prev, self.direction, self.sigma):
            array.flags.writeable = False

    @property
    def needs_noise(self) -> bool:
        """True where every step, the last too, draws noise: exactly with eta > 0, as in diffusers."""
        return self.eta > 0

    @property
    def affine(self) -> bool:
        """True where a step is x_prev = a·x + b·model_output + c·noise: x_0 is neither clipped nor thresholded."""
        return self.clip is None and self.threshold is None

    @property
    def rows(self) -> F32:
        """(a, b, c) of every step, float32 [steps, 3].

        Raises:
            SpecError: the steps are not affine.
        """
        if not self.affine:
            raise SpecError("schedule: clip_sample or thresholding is on, so a step has no row (a, b, c); use step()")
        return self.unclipped_rows()

    def unclipped_rows(self) -> F32:
        """``rows`` as they would be without clipping and thresholding."""
        signal, spread, signal_prev, direction = (
            values.astype(np.float64) for values in (self.signal, self.spread, self.signal_prev, self.direction)
        )
        if self.prediction_type == "epsilon":
            a, b = signal_prev / signal, direction - signal_prev * spread / signal
        elif self.prediction_type == "sample":
            a, b = direction / spread, signal_prev - direction * signal / spread
        else:
            a, b = signal_prev * signal + direction * spread, direction * signal - signal_prev * spread
        return np.stack([a, b, self.sigma], axis=1).astype(np.float32)

    def step(self, x: F32, model_output: F32, i: int, noise: F32 | None = None) -> F32:
        """x_prev after step ``i`` (0 is the first), float32 in the shape of x, by formulas (12) and (16) of the paper.

        Args:
            x, model_output: float32 [batch, ...], of one shape.
            noise: the same, standard normal; None exactly where ``needs_noise`` is False.

        Raises:
            SpecError: i is no step; dtypes or shapes differ; noise is missing, or given without need.
        """
        if not isinstance(i, int) or not 0 <= i < len(self.timesteps):
            raise SpecError(f"schedule: got step {i!r}, expected 0..{len(self.timesteps) - 1}")
        if (noise is not None) != self.needs_noise:
            given, expected = ("none", "some") if noise is None else ("some", "none")
            raise SpecError(f"schedule: noise: got {given}, expected {expected} with eta {self.eta:g}")
        for name, array in (("x", x), ("model_output", model_output), ("noise", x if noise is None else noise)):
            got = f"schedule: {name}: got {array.dtype} {list(array.shape)}"
            if array.dtype != np.float32 or array.ndim < 2 or not array.size:
                raise SpecError(f"{got}, expected float32 [batch, ...]; convert it with astype or reshape")
            if array.shape != x.shape:
                raise SpecError(f"{got}, expected the shape of x, {list(x.shape)}")
        if self.affine:
            a, b, c = self.unclipped_rows()[i]
            moved = a * x + b * model_output
        else:
            c = self.sigma[i]
            moved = self._clipped_step(x, model_output, i)
        return np.asarray(moved if noise is None else moved + c * noise, np.float32)

    def predicted(self, x: F32, model_output: F32, i: int) -> F32:
        """x_0 as foreseen at step ``i``, clipped or thresholded, which a preview shows; shapes as in ``step``."""
        return self._predicted(x, model_output, i)[0]

    def _predicted(self, x: F32, out: F32, i: int) -> tuple[F32, F32]:
        signal, spread = self.signal[i], self.spread[i]
        if self.prediction_type == "epsilon":
            x_0, eps = (x - spread * out) / signal, out
        elif self.prediction_type == "sample":
            x_0, eps = out, (x - signal * out) / spread
        else:
            x_0, eps = signal * x - spread * out, signal * out + spread * x
        if self.threshold is not None:
            x_0 = _threshold(x_0, *self.threshold)
        elif self.clip is not None:
            x_0 = np.clip(x_0, -self.clip, self.clip)
        return x_0, eps

    def _clipped_step(self, x: F32, out: F32, i: int) -> F32:
        x_0, eps = self._predicted(x, out, i)
        return np.asarray(self.signal_prev[i] * x_0 + self.direction[i] * eps, np.float32)


def _threshold(x_0: F32, ratio: float, highest: float) -> F32:
    """Clip each sample to a quantile of its magnitudes and divide by it (Saharia et al. 2022, arXiv:2205.11487)."""
    ordered = np.sort(np.abs(x_0).reshape(len(x_0), -1))
    rank = np.float32(ratio) * np.float32(ordered.shape[1] - 1)
    low, high = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
    quantile = low + (rank - np.floor(rank)) * (high - low)
    bound = np.minimum(np.maximum(quantile, np.float32(1)), np.float32(highest)).reshape(-1, *[1] * (x_0.ndim - 1))
    return np.asarray(np.clip(x_0, -bound, bound) / bound, np.float32)
