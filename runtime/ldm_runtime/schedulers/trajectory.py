"""Trajectory: all coefficients of one sampling run, and the arithmetic of its steps."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import shown

__all__ = ["Clip", "Threshold", "Trajectory", "finite_trajectory", "noisy_weights", "padded_rows"]

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """Clip x0 to ± ``range``.

    Args:
        range: Largest magnitude of the result.
    """

    range: float

    def __call__(self, x0: F32) -> F32:
        """Clip ``x0`` (float32, any shape)."""
        return np.asarray(np.clip(x0, -self.range, self.range), np.float32)


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487): clip each sample to a quantile and divide by it.

    Args:
        ratio: Quantile of the magnitudes of a sample, in [0, 1].
        max_value: Largest bound. The smallest is 1, unless ``max_value`` is below 1.
    """

    ratio: float
    max_value: float

    def __call__(self, x0: F32) -> F32:
        """Threshold ``x0`` (float32 [batch, ...]); each entry of the batch has its own bound."""
        ordered = np.sort(np.abs(x0).reshape(len(x0), -1))
        rank = np.float32(self.ratio) * np.float32(ordered.shape[1] - 1)
        low, high = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
        quantile = low + (rank - np.floor(rank)) * (high - low)
        bound = np.minimum(np.maximum(quantile, np.float32(1)), np.float32(self.max_value))
        bound = bound.reshape(-1, *[1] * (x0.ndim - 1))
        return np.asarray(np.clip(x0, -bound, bound) / bound, np.float32)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The calls of one sampling run, as a linear recurrence over a state of ``slots`` arrays.

    Slot 0 of the state is the latents x; the others are history (previous predictions, previous x0 or a saved x).
    After call i::

        state'[j] = sum_k rows[i, j, k] * state[k]
                    + rows[i, j, slots] * prediction + rows[i, j, slots + 1] * x0 + rows[i, j, slots + 2] * noise

    Arrays are read-only.

    Args:
        timesteps: int64 or, where they can be fractional, float32 [calls], one entry per UNet call.
        init_noise_sigma: The initial latents are standard normal noise times this.
        input_scale: float32 [calls]. The latents are multiplied by this before the UNet call.
        needs_noise: True if every call, including the last, draws standard normal noise in the shape of the latents.
        rows: float32 [calls, slots, slots + 3].
        x0_weights: float32 [calls, 2]. The predicted x0 before clipping is ``w[0] * x + w[1] * prediction``.
        noisy_weights: float32 [calls + 1, 2]. The latents of an image with the noise that x has before each call are
            ``w[0] * image + w[1] * noise``; the last row, after all calls, is 1 and 0.
        limit_x0: Clipping or thresholding of x0. If None, the x0 column of ``rows`` is zero.
    """

    timesteps: NDArray[np.int64] | NDArray[np.float32]
    init_noise_sigma: float
    input_scale: F32
    needs_noise: bool
    rows: F32
    x0_weights: F32
    noisy_weights: F32
    limit_x0: Clip | Threshold | None = None

    def __post_init__(self) -> None:
        for array in (self.timesteps, self.input_scale, self.rows, self.x0_weights, self.noisy_weights):
            array.flags.writeable = False

    def __len__(self) -> int:
        """Number of UNet calls."""
        return len(self.timesteps)

    @property
    def slots(self) -> int:
        """Number of arrays in the state."""
        return int(self.rows.shape[1])

    @property
    def affine(self) -> bool:
        """True if a step is affine in state, prediction and noise, because x0 is neither clipped nor thresholded."""
        return self.limit_x0 is None

    def after(self, calls: int) -> Trajectory:
        """Return the rest of this trajectory after ``calls`` calls, with an empty history."""
        return replace(
            self,
            timesteps=self.timesteps[calls:],
            input_scale=self.input_scale[calls:],
            rows=self.rows[calls:],
            x0_weights=self.x0_weights[calls:],
            noisy_weights=self.noisy_weights[calls:],
        )

    def start(self, latents: F32) -> list[F32]:
        """Return the initial state: the latents, already multiplied by ``init_noise_sigma``, and zeros as history.

        Args:
            latents: float32 [batch, ...].

        Raises:
            SpecError: ``latents`` has another dtype, fewer than two dimensions or no elements.
        """
        _check("latents", latents, latents)
        return [latents, *(np.zeros_like(latents) for _ in range(self.slots - 1))]

    def predict_x0(self, x: F32, prediction: F32, i: int) -> F32:
        """Return x0 as predicted at call ``i``, clipped or thresholded; float32 in the shape of ``x``.

        Args:
            x: Latents before the call, float32 [batch, ...].
            prediction: Model output after guidance, of the same dtype and shape.
            i: Index of the call.

        Raises:
            SpecError: There is no call ``i``, or a dtype or shape differs.
        """
        i = self._index(i)
        _check("x", x, x)
        _check("prediction", prediction, x)
        x0 = _combined(self.x0_weights[i], (x, prediction))
        return x0 if self.limit_x0 is None else self.limit_x0(x0)

    def step(self, state: Sequence[F32], prediction: F32, i: int, noise: F32 | None = None) -> list[F32]:
        """Return the state after call ``i``: ``slots`` new float32 arrays in the shape of the latents.

        Terms are added in float32 in the order state, prediction, x0, noise; zero coefficients are skipped.

        Args:
            state: ``slots`` arrays, float32 [batch, ...].
            prediction: Model output after guidance, of the same dtype and shape.
            i: Index of the call; 0 is the first.
            noise: Standard normal noise, of the same dtype and shape; None if and only if ``needs_noise`` is False.

        Raises:
            SpecError: There is no call ``i``; the number of arrays, a dtype or a shape is wrong; noise is missing or
                not needed.
        """
        i = self._index(i)
        if len(state) != self.slots:
            raise SpecError(f"trajectory: state: got {len(state)} arrays, expected {self.slots}; begin with start()")
        if (noise is not None) != self.needs_noise:
            actual, expected = ("none", "some") if noise is None else ("some", "none")
            raise SpecError(f"trajectory: noise: got {actual}, expected {expected}; see needs_noise")
        x = state[0]
        for k, array in enumerate(state):
            _check(f"state[{k}]" if k else "x", array, x)
        _check("prediction", prediction, x)
        _check("noise", x if noise is None else noise, x)
        x0 = None if self.limit_x0 is None else self.predict_x0(x, prediction, i)
        return [_combined(row, (*state, prediction, x0, noise)) for row in self.rows[i]]

    def _index(self, i: int) -> int:
        try:
            index = -1 if isinstance(i, bool) else operator.index(i)
        except TypeError:
            index = -1
        if not 0 <= index < len(self):
            raise SpecError(f"trajectory: got step {shown(i)}, expected 0..{len(self) - 1}")
        return index


def padded_rows(rows: F32, slots: int) -> F32:
    """Coefficients of a trajectory for a state with more slots, e.g. of a batch or a graph.

    Args:
        rows: ``Trajectory.rows``, float32 [calls, own, own + 3].
        slots: Number of slots, at least ``own``.

    Returns:
        float32 [calls, slots, slots + 3]; the added slots stay zero and are not used.
    """
    own = rows.shape[1]
    if own == slots:
        return rows
    padded = np.zeros((len(rows), slots, slots + 3), np.float32)
    padded[:, :own, :own] = rows[:, :, :own]
    padded[:, :own, slots:] = rows[:, :, own:]
    return padded


def _check(name: str, array: F32, x: F32) -> None:
    if array.dtype != np.float32 or array.ndim < 2 or not array.size:
        expected = "float32 [batch, ...]; convert it with astype or reshape"
    elif array.shape != x.shape:
        expected = f"the shape of x, {list(x.shape)}"
    else:
        return  # the usual case at every step: no text is made
    raise SpecError(f"trajectory: {name}: got {array.dtype} {list(array.shape)}, expected {expected}")


def _combined(weights: F32, arrays: Sequence[F32 | None]) -> F32:
    """Sum of weight times array in order, without the terms of weight zero; a new float32 array."""
    total: F32 | None = None
    for weight, array in zip(weights, arrays, strict=True):
        if weight != 0 and array is not None:
            term = weight * array
            total = term if total is None else total + term
    if total is None:
        total = np.zeros_like(arrays[0])
    return np.asarray(total, np.float32)


def noisy_weights(signal: NDArray[np.floating], noise: NDArray[np.floating]) -> F32:
    """Return ``Trajectory.noisy_weights``, float32 [calls + 1, 2].

    Args:
        signal: Weight of the image before each call, [calls].
        noise: Weight of the noise, [calls].
    """
    return np.stack([np.append(signal, 1), np.append(noise, 0)], axis=1).astype(np.float32)


def finite_trajectory(
    timesteps: NDArray[np.int64],
    rows: NDArray[np.float64],
    x0_weights: NDArray[np.float64],
    alphas: F32,
    limit_x0: Clip | Threshold | None = None,
    draws: bool | None = None,
) -> Trajectory:
    """Build a trajectory without scaling of noise and model input, and check that its coefficients are finite.

    Args:
        timesteps, rows, x0_weights, limit_x0: See ``Trajectory``.
        alphas: ᾱ of the timesteps, float32 [calls].
        draws: Value of ``needs_noise``; None for True if any call adds noise.

    Raises:
        SpecError: A coefficient is not finite.
    """
    finite = np.isfinite(rows).all(axis=(1, 2)) & np.isfinite(x0_weights).all(axis=1)
    if not finite.all():
        raise SpecError(
            f"scheduler: timestep {timesteps[int(np.argmin(finite))]}: alpha_cumprod is 0 or 1, and this scheduler or "
            "prediction_type divides by it or by 1 - it; expected other betas, and with rescale_betas_zero_snr a model "
            "of prediction_type 'v_prediction'"
        )
    return Trajectory(
        timesteps=timesteps,
        init_noise_sigma=1.0,
        input_scale=np.ones(len(timesteps), np.float32),
        needs_noise=bool(rows[..., -1].any()) if draws is None else draws,
        rows=rows.astype(np.float32),
        x0_weights=x0_weights.astype(np.float32),
        noisy_weights=noisy_weights(np.sqrt(alphas), np.sqrt(1 - alphas)),
        limit_x0=limit_x0,
    )
