"""Five observers, which derive from a histogram the magnitude that becomes the largest int8 value."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.histogram import Histogram

__all__ = ["HEADROOM", "LEVELS", "OBSERVERS", "expected_error", "threshold"]

LEVELS = 127
"""Symmetric int8 uses the values -127 to 127 and zero point 0; TensorRT accepts no other zero point."""
OBSERVERS = ("minmax", "headroom", "percentile", "entropy", "mse")
HEADROOM = 1.2
"""Threshold of the observer "headroom", as a multiple of the largest magnitude."""
_STEPS = 96


def threshold(histogram: Histogram, observer: str) -> float:
    """Magnitude that becomes 127; larger magnitudes are clipped to it.

    - "minmax": the largest magnitude.
    - "headroom": ``HEADROOM`` times the largest magnitude, for tensors that grow larger in other images.
    - "percentile": the moving average over all calls of the 99.99th percentile of each call.
    - "entropy": the threshold with the least Kullback-Leibler divergence between the values and their int8 form (the
      method of TensorRT: Migacz, "8-bit Inference with TensorRT", GTC 2017).
    - "mse": the threshold with the least expected squared error.

    A tensor of zeros has threshold 1.

    Raises:
        ValueError: ``observer`` is none of these.
    """
    if not histogram.largest:
        return 1.0
    if observer == "minmax":
        return histogram.largest
    if observer == "headroom":
        return HEADROOM * histogram.largest
    if observer == "percentile":
        return min(histogram.moving or histogram.largest, histogram.largest)
    if observer == "entropy":
        return min(_entropy(histogram), histogram.largest)
    if observer == "mse":
        return _mse(histogram)
    raise ValueError(f"observer: got {observer!r}, expected one of {', '.join(OBSERVERS)}")


def _mse(histogram: Histogram) -> float:
    filled = histogram.counts > 0
    counts, centres = histogram.counts[filled], histogram.centres[filled]
    candidates = histogram.largest * np.linspace(0.05, 1.0, _STEPS)
    errors = [expected_error(counts, centres, float(candidate)) for candidate in candidates]
    return float(candidates[int(np.argmin(errors))])


def expected_error(counts: NDArray[np.int64], centres: NDArray[np.float64], clip: float) -> float:
    """Sum of squared errors of magnitudes quantized with threshold ``clip``."""
    step = clip / LEVELS
    return float((counts * np.square(centres - np.minimum(np.rint(centres / step), LEVELS) * step)).sum())


def _entropy(histogram: Histogram) -> float:
    """Threshold of "entropy". Bins are merged to 2048; clipped values count in a candidate's last bin."""
    counts = histogram.counts.reshape(2048, -1).sum(1).astype(np.float64)
    width, levels = histogram.top / 2048, LEVELS + 1
    last = int(np.flatnonzero(counts)[-1]) + 1
    best, chosen = np.inf, last
    for stop in range(levels, last + 1, 8) if last > levels else (last,):
        clipped = counts[:stop].copy()
        clipped[-1] += counts[stop:].sum()
        divergence = _divergence(clipped, _blurred(counts[:stop], min(levels, stop)))
        if divergence < best:
            best, chosen = divergence, stop
    return float(chosen * width)


def _blurred(counts: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """Merge the counts into ``levels`` groups and spread each group evenly over its non-empty bins."""
    groups = np.minimum(np.arange(len(counts)) * levels // len(counts), levels - 1)
    filled = counts > 0
    sums, sizes = np.bincount(groups, counts, levels), np.bincount(groups, filled, levels)
    means = np.divide(sums, sizes, out=np.zeros(levels), where=sizes > 0)
    return np.where(filled, means[groups], 0.0)


def _divergence(values: NDArray[np.float64], quantized: NDArray[np.float64]) -> float:
    if not quantized.sum():
        return float(np.inf)
    p, q = values / values.sum(), quantized / quantized.sum()
    smallest = 1e-9
    filled = p > 0
    return float((p[filled] * np.log(p[filled] / np.maximum(q[filled], smallest))).sum())
