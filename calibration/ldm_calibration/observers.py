"""From a histogram of magnitudes to the largest magnitude that int8 still holds: four ways."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.histogram import Histogram

LEVELS = 127
"""Symmetric int8 uses -127 … 127, zero point 0: TensorRT takes no other."""
OBSERVERS = ("minmax", "percentile", "entropy", "mse")
_STEPS = 96


def threshold(histogram: Histogram, observer: str) -> float:
    """The magnitude that is to become 127; larger ones are clipped to it.

    - "minmax": the largest seen.
    - "percentile": the moving average, over the calls, of each call's 99.99th percentile.
    - "entropy": least Kullback-Leibler divergence of what int8 can tell apart from what was seen (the TensorRT method,
      Migacz, GTC 2017).
    - "mse": least expected squared error.

    A tensor of zeros gets 1.
    """
    if not histogram.largest:
        return 1.0
    if observer == "minmax":
        return histogram.largest
    if observer == "percentile":
        return min(histogram.moving or histogram.largest, histogram.largest)
    if observer == "entropy":
        return min(_entropy(histogram), histogram.largest)
    if observer == "mse":
        return _mse(histogram)
    raise ValueError(f"observer {observer!r} is none of {', '.join(OBSERVERS)}")


def _mse(histogram: Histogram) -> float:
    held = histogram.counts > 0
    counts, centres = histogram.counts[held], histogram.centres[held]
    candidates = histogram.largest * np.linspace(0.05, 1.0, _STEPS)
    errors = [expected_error(counts, centres, float(candidate)) for candidate in candidates]
    return float(candidates[int(np.argmin(errors))])


def expected_error(counts: NDArray[np.int64], centres: NDArray[np.float64], clip: float) -> float:
    """Sum of squared errors of magnitudes quantized with threshold ``clip``."""
    step = clip / LEVELS
    return float((counts * np.square(centres - np.minimum(np.rint(centres / step), LEVELS) * step)).sum())


def _entropy(histogram: Histogram) -> float:
    """Bins are first merged to 2048; of every candidate prefix the clipped rest falls into the last bin."""
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
    """The counts told apart in ``levels`` groups only, each spread evenly over its bins that are not empty."""
    groups = np.minimum(np.arange(len(counts)) * levels // len(counts), levels - 1)
    held = counts > 0
    sums, sizes = np.bincount(groups, counts, levels), np.bincount(groups, held, levels)
    means = np.divide(sums, sizes, out=np.zeros(levels), where=sizes > 0)
    return np.where(held, means[groups], 0.0)


def _divergence(seen: NDArray[np.float64], told: NDArray[np.float64]) -> float:
    if not told.sum():
        return float(np.inf)
    p, q = seen / seen.sum(), told / told.sum()
    smallest = 1e-9
    held = p > 0
    return float((p[held] * np.log(p[held] / np.maximum(q[held], smallest))).sum())
