"""Histograms and observers against NumPy and ONNX Runtime's own entropy calibration, weights against plain loops."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnxruntime.quantization.calibrate import HistogramCollector

from ldm_calibration.histogram import BINS, Histogram
from ldm_calibration.observers import LEVELS, OBSERVERS, threshold
from ldm_calibration.sampling import chosen_steps
from ldm_calibration.weights import quantize_weights, smoothing_factors

SPREADS = {
    "normal": lambda rng: rng.standard_normal(20_000),
    "silu": lambda rng: (lambda x: x / (1 + np.exp(-x)))(3 * rng.standard_normal(20_000)),
    "heavy": lambda rng: rng.standard_t(3, 20_000),
    "outlier": lambda rng: np.append(rng.standard_normal(20_000), 60.0),
}


def values(name: str) -> np.ndarray:
    return SPREADS[name](np.random.default_rng(1)).astype(np.float32)


def histogram_of(array: np.ndarray, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(array, parts):
        histogram.add(part)
    return histogram


def quantized(array: np.ndarray, clip: float) -> np.ndarray:
    step = clip / LEVELS
    return np.clip(np.rint(array / step), -LEVELS, LEVELS) * step


@example([1.4e-45, 0.0], 1, Random(0))
@example([0.5, 1.0], 2, Random(0))
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.integers(1, 8), st.randoms())
def test_counts_are_numpys_whatever_the_order_and_the_parts(numbers: list[float], parts: int, random: object) -> None:
    array = np.array(numbers, np.float32)
    histogram = histogram_of(array, min(parts, len(array)))
    again = list(numbers)
    random.shuffle(again)  # type: ignore[attr-defined]
    other = histogram_of(np.array(again, np.float32))
    assert (histogram.top, histogram.counts.tolist()) == (other.top, other.counts.tolist())
    assert histogram.counts.sum() == len(array) and histogram.largest == np.abs(array).max()
    if histogram.top > 1e-30:
        assert histogram.top / 2 <= histogram.largest < histogram.top


@pytest.mark.parametrize("name", SPREADS)
def test_a_histogram_is_numpys(name: str) -> None:
    array = values(name)
    histogram = histogram_of(array, 7)
    expected, _ = np.histogram(np.abs(array), BINS, (0, histogram.top))
    assert np.abs(histogram.counts - expected).sum() <= 2e-3 * len(array)  # values on a bin's edge


@pytest.mark.parametrize("name", SPREADS)
def test_minmax_and_percentile(name: str) -> None:
    array = values(name)
    histogram = histogram_of(array)
    assert threshold(histogram, "minmax") == np.abs(array).max()
    exact = np.quantile(np.abs(array), 0.9999)
    assert abs(threshold(histogram, "percentile") - exact) <= 2 * histogram.top / BINS + 0.1 * exact


def test_the_percentile_moves_with_the_calls() -> None:
    histogram = Histogram()
    calls = [np.full(1000, size, np.float32) for size in (4.0, 4.0, 1.0, 1.0)]
    expected = None
    for call in calls:
        histogram.add(call)
        expected = call[0] if expected is None else 0.9 * expected + 0.1 * call[0]
    assert threshold(histogram, "percentile") == pytest.approx(expected, rel=0.002)


@pytest.mark.parametrize("name", SPREADS)
def test_mse_is_as_good_as_the_best_of_a_fine_search(name: str) -> None:
    array = values(name)
    error = {
        clip: np.square(array - quantized(array, clip)).mean()
        for clip in np.abs(array).max() * np.linspace(0.02, 1, 150)
    }
    result = np.square(array - quantized(array, threshold(histogram_of(array), "mse"))).mean()
    assert result <= 1.03 * min(error.values())


@pytest.mark.parametrize("name", ["normal", "silu"])
def test_entropy_agrees_with_onnxruntimes(name: str) -> None:
    array = values(name)
    largest = float(np.abs(array).max())
    counts, edges = np.histogram(
        np.concatenate([array, -array]), 1025, (-largest, largest)
    )  # theirs is of signed values
    collector = HistogramCollector("entropy", True, 1025, 255, 99.99, "same")
    _, theirs = collector.get_entropy_threshold((counts, edges, -largest, largest, largest), 255)[:2]
    ours = threshold(histogram_of(array), "entropy")
    assert ours == pytest.approx(float(np.ravel(theirs)[0]), rel=0.25)


def test_zeros_and_what_is_not_finite() -> None:
    assert {threshold(histogram_of(np.zeros(10, np.float32)), observer) for observer in OBSERVERS} == {1.0}
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="not finite"):
            Histogram().add(np.array([1.0, bad], np.float32))


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
