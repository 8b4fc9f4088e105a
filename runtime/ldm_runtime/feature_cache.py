"""Feature caching: some UNet calls compute only the shallow layers and reuse deep features of an earlier call.

DeepCache (Ma et al. 2023, arXiv:2312.00858): the deep features of a UNet change little from one step to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.denoiser import Denoiser, Tensors
from ldm_runtime.errors import SpecError
from ldm_runtime.guidance import StepBranches
from ldm_runtime.number_checks import integer

__all__ = ["DeepFeatures", "shallow_calls"]

F32 = NDArray[np.float32]
Rows = slice | NDArray[np.intp]
MAX_EVERY = 1000


def shallow_calls(every: int, full_steps: Any, initial: int, steps: Sequence[StepBranches]) -> tuple[bool, ...]:
    """Decide, for each UNet call, whether it computes the shallow layers only.

    Each guidance branch has its own deep features, from the last whole call that evaluated it. Both branches must use
    features of the same call, because guidance multiplies their difference. Therefore a whole call that is due at a
    step that reuses the guidance direction is delayed to the next call that evaluates both branches, and a call that
    evaluates both branches is whole if the last whole call evaluated only one.

    Args:
        every: Compute the whole UNet at every N-th call; 1 for all calls. Calls are counted, not steps, so a scheduler
            with two calls per step reuses features within a step.
        full_steps: Number of calls at the start that compute the whole UNet, because they decide the layout of the
            image; None for ``initial``. A list instead contains the indices of all whole calls and replaces ``every``;
            the first call, and the first that evaluates both branches, are always whole.
        initial: Value of ``full_steps`` if that is None.
        steps: The branches that each UNet call evaluates.

    Returns:
        True for each call that reuses deep features.

    Raises:
        SpecError: A value cannot be used.
    """
    every = integer("cache_every", every, 1, MAX_EVERY)
    if isinstance(full_steps, list | tuple | np.ndarray):
        if every != 1:
            raise SpecError(f"full_steps: got a list beside cache_every {every}; a list replaces it, leave one out")
        indices = full_steps.ravel().tolist() if isinstance(full_steps, np.ndarray) else full_steps
        listed = {integer("full_steps", index, 0, len(steps) - 1) for index in indices}
        listed |= {0, *_both(steps)[:1]}
        return tuple(index not in listed for index in range(len(steps)))
    first = max(1, integer("full_steps", initial if full_steps is None else full_steps, 0, MAX_EVERY))
    return (False,) * len(steps) if every == 1 else _at_intervals(every, first, steps)


def _both(steps: Sequence[StepBranches]) -> list[int]:
    """Indices of the calls that evaluate both branches."""
    return [index for index, evaluated in enumerate(steps) if evaluated is StepBranches.BOTH]


def _at_intervals(every: int, first: int, steps: Sequence[StepBranches]) -> tuple[bool, ...]:
    last_both = max(_both(steps), default=-1)
    shallow, last_whole, cached_both = list[bool](), 0, False
    for index, evaluated in enumerate(steps):
        both = evaluated is StepBranches.BOTH
        waits = evaluated is StepBranches.REUSED and index < last_both
        due = index < first or (index - last_whole >= every and not waits)
        shallow.append(not due and (cached_both or not both))
        if not shallow[-1]:
            last_whole, cached_both = index, both
    return tuple(shallow)


class DeepFeatures:
    """Deep features of the rows of a request or a batch, kept between UNet calls.

    Args:
        denoiser: Predicts the noise.
        rows: Number of rows.
    """

    def __init__(self, denoiser: Denoiser, rows: int):
        self._denoiser, self._rows = denoiser, rows
        self._features: F32 | None = None

    def predict(
        self, sample: F32, schedule: Tensors, conditioning: Tensors, rows: Rows, *, shallow: bool, keep: bool
    ) -> F32:
        """Predict noise like ``Denoiser``, with the shallow UNet or with the whole UNet.

        Args:
            sample, schedule, conditioning: As for ``Denoiser``.
            rows: Rows of the features that belong to the first rows of the sample; the remaining rows are padding.
            shallow: True uses the features of these rows, with the shallow UNet.
            keep: True keeps the features of these rows for later calls; ignored with ``shallow``.

        Raises:
            SpecError, BackendError: As ``Denoiser``.
        """
        if shallow:
            assert self._features is not None
            known = self._features[rows]
            padding = np.zeros((len(sample) - len(known), *known.shape[1:]), np.float32)
            features = known if not len(padding) else np.concatenate([known, padding])
            return self._denoiser.shallow(sample, schedule, conditioning, features)
        if not keep:
            return self._denoiser(sample, schedule, conditioning)
        predicted, features = self._denoiser.whole(sample, schedule, conditioning)
        if self._features is None:
            self._features = np.zeros((self._rows, *features.shape[1:]), np.float32)
        used = self._features[rows].shape[0] if isinstance(rows, slice) else len(rows)
        self._features[rows] = features[:used]
        return predicted

    def move(self, source: slice, target: slice) -> None:
        """Copy the features of some rows to another place; the two may overlap."""
        if self._features is not None:
            self._features[target] = self._features[source]
