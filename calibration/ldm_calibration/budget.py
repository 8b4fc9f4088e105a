"""Which layers become int8: as much work as the budget lets; those that cost most for what they save stay float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ldm_calibration.trials import Comparison

LEAST_SHARE = 0.1
"""A component with less of its work in int8 than this is not worth a graph of its own."""


@dataclass(frozen=True)
class Budget:
    """Bounds on the pictures; None for none."""

    min_psnr: float | None
    max_accuracy_loss: float | None

    def admits(self, found: Comparison) -> bool:
        """True where all bounds are kept."""
        loss = found.accuracy_loss
        enough = self.min_psnr is None or found.psnr_mean >= self.min_psnr
        return enough and (self.max_accuracy_loss is None or (loss is not None and loss <= self.max_accuracy_loss))


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        layers: to be int8, in the graph's order; empty where the budget leaves too little.
        tried: (share of the work in int8, mean PSNR in dB) of every trial.
        found: of the trial that was chosen; None where none was.
    """

    layers: tuple[str, ...]
    tried: tuple[tuple[float, float], ...]
    found: Comparison | None


def ranked(decibels: Mapping[str, float], flops: Mapping[str, int]) -> list[str]:
    """Layers by the harm they do for each operation they save, the worst first.

    Args:
        decibels: layer → signal-to-noise ratio with it in int8.
        flops: layer → its operations.
    """
    return sorted(decibels, key=lambda name: (-(10 ** (-decibels[name] / 10)) / max(flops[name], 1), name))


def select(
    order: Sequence[str], flops: Mapping[str, int], budget: Budget, trial: Callable[[Sequence[str]], Comparison]
) -> Selection:
    """The most layers that keep to the budget: those at the end of ``order``, found by bisection.

    Args:
        order: candidates, the worst first.
        flops: of all layers of the graph, candidates or not.
        budget: to keep to.
        trial: draws pictures with these layers in int8.
    """
    total = sum(flops.values())
    position = {name: place for place, name in enumerate(flops)}
    tried: list[tuple[float, float]] = []

    def attempt(released: int) -> Comparison:
        chosen = order[released:]
        found = trial(sorted(chosen, key=position.__getitem__))
        tried.append((sum(flops[name] for name in chosen) / total, found.psnr_mean))
        return found

    best: tuple[int, Comparison] | None = None
    if order:
        low, high = 0, _most_released(order, flops)
        found = attempt(low)
        if budget.admits(found):
            best = low, found
        elif high > low and budget.admits(found := attempt(high)):
            best = high, found
            while high - low > 1:
                middle = (low + high) // 2
                if budget.admits(found := attempt(middle)):
                    high, best = middle, (middle, found)
                else:
                    low = middle
    if best is None:
        return Selection((), tuple(tried), None)
    return Selection(tuple(sorted(order[best[0] :], key=position.__getitem__)), tuple(tried), best[1])


def _most_released(order: Sequence[str], flops: Mapping[str, int]) -> int:
    """How many layers may be released before less than ``LEAST_SHARE`` of the work is left."""
    least, left = LEAST_SHARE * sum(flops.values()), 0.0
    for place in range(len(order) - 1, -1, -1):
        left += flops[order[place]]
        if left >= least:
            return place
    return 0
