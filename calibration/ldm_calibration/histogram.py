"""A histogram of magnitudes whose range grows with the values. Its memory does not depend on the number of values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINS", "Histogram", "quantile_of"]

BINS = 4096
LOWEST_TOP = 2.0**-100
"""Smallest upper end, because float32 cannot resolve bins of a smaller range. Smaller values are in the first bin."""


@dataclass
class Histogram:
    """Counts of |x| in ``BINS`` equal bins from 0 to ``top``.

    ``top`` is a power of two above all values, at least ``LOWEST_TOP``. For a larger value, it is doubled and adjacent
    bins are merged, so the counts do not depend on the order of the values.

    Attributes:
        top: Upper end of the last bin; 0 while all values are zero.
        counts: int64 [BINS].
        largest: Largest magnitude so far.
        lowest: Lowest value so far.
        moving: Exponential moving average of each call's ``quantile``; None before the first call.
    """

    top: float = 0.0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    largest: float = 0.0
    lowest: float = 0.0
    moving: float | None = None

    def add(self, values: NDArray[np.float32], quantile: float = 0.9999, momentum: float = 0.9) -> None:
        """Count the values and update the moving average of the quantile.

        Raises:
            ValueError: A value is not finite.
        """
        magnitudes = np.abs(values).ravel()
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ValueError("not finite")
        self.largest = max(self.largest, largest)
        self.lowest = min(self.lowest, float(values.min(initial=0.0)))
        self._reach(largest)
        if self.top:
            places = (magnitudes * np.float32(BINS / self.top)).astype(np.int32)
            fresh = np.bincount(places, minlength=BINS)
            self.counts += fresh
            now = quantile_of(fresh, self.top, quantile)
        else:
            self.counts[0] += magnitudes.size
            now = 0.0
        self.moving = now if self.moving is None else momentum * self.moving + (1 - momentum) * now

    def _reach(self, largest: float) -> None:
        if not largest:
            return
        if not self.top:
            self.top = max(2.0 ** math.frexp(largest)[1], LOWEST_TOP)
        while largest >= self.top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2

    @property
    def centres(self) -> NDArray[np.float64]:
        """Centre of each bin, float64 [BINS]."""
        return np.asarray((np.arange(BINS) + 0.5) * (self.top / BINS), np.float64)


def quantile_of(counts: NDArray[np.int64], top: float, quantile: float) -> float:
    """Return the upper end of the first bin at which the cumulative share of the values reaches ``quantile``."""
    total = int(counts.sum())
    place = int(np.searchsorted(np.cumsum(counts), quantile * total))
    return (min(place, BINS - 1) + 1) * top / BINS
