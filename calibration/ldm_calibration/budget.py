"""Selects the layers that become int8: as many operations as the budget allows, without the most harmful layers.

Most of the error comes from a few layers with few operations. Of the layers whose share of the error is much larger
than their share of the operations, those that cause the most error together stay in float, whatever the budget; if
that exceeds the budget, more layers return to float.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ldm_calibration.trials import Comparison

__all__ = ["LEAST_SHARE", "Budget", "Selection", "costly", "ranked", "select"]

LEAST_SHARE = 0.1
"""Minimum share of a component's operations in int8; a smaller share is not worth a separate graph."""
FLOAT_SHARE = 0.1
"""Maximum share of a component's operations in float, unless the budget requires more."""
COSTLY = 2.0
"""A layer is costly if its share of the error is at least this multiple of its share of the operations."""
PARTS = 10_000
"""Resolution of the share of operations when the costly layers are selected."""


@dataclass(frozen=True)
class Budget:
    """Bounds on the quality of the trial images; None means no bound.

    Attributes:
        min_psnr: Minimum mean PSNR in dB.
        max_accuracy_loss: Maximum loss of prompt accuracy, from 0 to 1.
    """

    min_psnr: float | None
    max_accuracy_loss: float | None

    def admits(self, comparison: Comparison) -> bool:
        """True if the images are within all bounds."""
        loss = comparison.accuracy_loss
        enough = self.min_psnr is None or comparison.psnr_mean >= self.min_psnr
        return enough and (self.max_accuracy_loss is None or (loss is not None and loss <= self.max_accuracy_loss))


@dataclass(frozen=True)
class Selection:
    """The layers of a component that become int8.

    Attributes:
        layers: Names of the layers in the order of the graph; empty if the budget allows less than ``LEAST_SHARE`` of
            the operations.
        attempts: (Share of the operations in int8, mean PSNR in dB) of every trial.
        comparison: Trial images of the selection; None if there is none.
    """

    layers: tuple[str, ...]
    attempts: tuple[tuple[float, float], ...]
    comparison: Comparison | None


def ranked(decibels: Mapping[str, float], flops: Mapping[str, int]) -> list[str]:
    """Sort layers by the error they cause for each operation they save, the worst first.

    Args:
        decibels: Layer -> signal-to-noise ratio with the layer in int8.
        flops: Layer -> its operations.
    """
    return sorted(decibels, key=lambda name: (-(10 ** (-decibels[name] / 10)) / max(flops[name], 1), name))


def costly(decibels: Mapping[str, float], flops: Mapping[str, int]) -> list[str]:
    """Find the layers that stay in float whatever the budget, in the order of ``ranked``.

    A layer is eligible if its share of the error is ``COSTLY`` times its share of the candidates' operations. Of all
    sets of eligible layers with which at most ``FLOAT_SHARE`` of the operations are in float, the result is the one
    with the most error. This is a knapsack problem: the layer with the most error per operation is not always part of
    it, because it can take the room of a larger layer with more error.

    Args:
        decibels: Candidate layer -> signal-to-noise ratio with the layer in int8.
        flops: Every layer of the graph, candidate or not -> its operations.
    """
    error = {name: 10 ** (-decibel / 10) for name, decibel in decibels.items()}
    work, total = sum(flops[name] for name in decibels), sum(flops.values())
    room = int(PARTS * (FLOAT_SHARE * total - (total - work)) / max(total, 1))
    best = {0: (0.0, list[str]())}  # parts in use -> error of the best set of layers, and these layers
    for name in ranked(decibels, flops):
        if error[name] * work < COSTLY * flops[name] * sum(error.values()):
            continue
        size = -(-PARTS * flops[name] // total)
        for used, (saved, layers) in list(best.items()):
            place, more = used + size, saved + error[name]
            if place <= room and (place not in best or more > best[place][0]):
                best[place] = more, [*layers, name]
    return max(best.values(), key=lambda entry: entry[0])[1]


def select(
    order: Sequence[str],
    flops: Mapping[str, int],
    budget: Budget,
    trial: Callable[[Sequence[str]], Comparison],
    released: int = 0,
) -> Selection:
    """Find by bisection the longest tail of ``order`` that is within the budget in int8.

    Args:
        order: Candidate layers, the worst first.
        flops: Layer of the graph, candidate or not -> its operations.
        budget: Bounds to keep.
        trial: Generates trial images with these layers in int8.
        released: Number of layers at the start of ``order`` that stay in float whatever the budget.
    """
    total = sum(flops.values())
    position = {name: place for place, name in enumerate(flops)}
    attempts: list[tuple[float, float]] = []

    def attempt(released: int) -> Comparison:
        chosen = order[released:]
        comparison = trial(sorted(chosen, key=position.__getitem__))
        attempts.append((sum(flops[name] for name in chosen) / total, comparison.psnr_mean))
        return comparison

    best: tuple[int, Comparison] | None = None
    if order:
        low, high = released, max(released, _most_released(order, flops))
        comparison = attempt(low)
        if budget.admits(comparison):
            best = low, comparison
        elif high > low and budget.admits(comparison := attempt(high)):
            best = high, comparison
            while high - low > 1:
                middle = (low + high) // 2
                if budget.admits(comparison := attempt(middle)):
                    high, best = middle, (middle, comparison)
                else:
                    low = middle
    if best is None:
        return Selection((), tuple(attempts), None)
    return Selection(tuple(sorted(order[best[0] :], key=position.__getitem__)), tuple(attempts), best[1])


def _most_released(order: Sequence[str], flops: Mapping[str, int]) -> int:
    """Return how many layers can stay in float so that at least ``LEAST_SHARE`` of the operations are in int8."""
    least, total = LEAST_SHARE * sum(flops.values()), 0.0
    for place in range(len(order) - 1, -1, -1):
        total += flops[order[place]]
        if total >= least:
            return place
    return 0
