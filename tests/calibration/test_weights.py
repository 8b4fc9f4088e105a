"""Quantized weights and smoothing factors against plain loops, and the choice of observed steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_calibration.sampling import chosen_steps
from ldm_calibration.weights import quantize_weights, smoothing_factors


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 3, 3), 0), ((6, 9), 1), ((9, 6), 0)])
def test_weights_channel_by_channel(shape: tuple[int, ...], axis: int) -> None:
    weights = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.moveaxis(weights, axis, 0)[1] = 0
    quantized_weights, scales = quantize_weights(weights, axis)
    assert quantized_weights.dtype == np.int8 and quantized_weights.min() >= -127 and scales.shape == (shape[axis],)
    for i, channel in enumerate(np.moveaxis(weights, axis, 0)):
        scale = np.abs(channel).max() / 127 or 1.0
        assert scales[i] == pytest.approx(scale)
        assert np.array_equal(np.moveaxis(quantized_weights, axis, 0)[i], np.rint(channel / scales[i]).astype(np.int8))


@given(st.floats(0.05, 1.0), st.integers(0, 99))
def test_smoothing_leaves_the_product_unchanged(exponent: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((20, 16)) * np.exp(rng.standard_normal(16))).astype(np.float32)
    w = rng.standard_normal((16, 5)).astype(np.float32)
    factors = smoothing_factors(np.abs(x).max(0), np.abs(w).max(1), exponent)
    assert np.allclose((x / factors) @ (w * factors[:, None]), x @ w, rtol=1e-3, atol=1e-3)
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-3)


def test_samples_lie_denser_where_ranges_move() -> None:
    still = np.ones((50, 3), np.float32)
    assert chosen_steps(still, 10) == sorted(set(np.rint(np.linspace(0, 49, 10)).astype(int).tolist()))
    moving = still.copy()
    moving[40:] *= np.exp(np.arange(1, 11))[:, None]
    result = chosen_steps(moving, 11)
    assert result[0] == 0 and result[-1] == 49
    assert sum(step >= 39 for step in result) > sum(step < 39 for step in result)
    assert chosen_steps(still[:4], 10) == [0, 1, 2, 3]
