"""Feature caching: UNet calls that compute the shallow layers only, with the deep features of an earlier call.

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

    Each branch of guidance has deep features of its own, those of the last whole call that has evaluated it. A call
    that evaluates a branch for the first time computes the whole UNet.

    Args:
        every: Compute the whole UNet at every N-th call; 1 for each. Calls are counted, so a scheduler with two calls
            per step reuses features within a step.
        full_steps: Number of calls at the start that compute the whole UNet, because they decide on the layout of the
            image; None for ``initial``. Or the indices of all such calls, instead of ``every``.
        initial: Number of these calls if ``full_steps`` is None.
        steps: What each UNet call evaluates.

    Returns:
        True for each call that reuses deep features.

    Raises:
        SpecError: A value cannot be used.
    """
    every = integer("cache_every", every, 1, MAX_EVERY)
    if full_steps is None or not isinstance(full_steps, list | tuple | np.ndarray):
        first = max(1, integer("full_steps", initial if full_steps is None else full_steps, 0, MAX_EVERY))
        whole = [index < first or (index - first + 1) % every == 0 for index in range(len(steps))]
    else:
        if every != 1:
            raise SpecError(f"full_steps: got a list beside cache_every {every}; a list replaces it, leave one out")
        listed = {integer("full_steps", index, 0, len(steps) - 1) for index in np.asarray(full_steps, object).ravel()}
        whole = [index in listed or index == 0 for index in range(len(steps))]
    both = [evaluated is StepBranches.BOTH for evaluated in steps]
    if any(both):
        whole[both.index(True)] = True
    return tuple(not computed for computed in whole)


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
        """Predict noise as ``Denoiser``, by the shallow layers or by the whole UNet.

        Args:
            sample, schedule, conditioning: As for ``Denoiser``.
            rows: Rows of the features that belong to the first rows of the sample; others of the sample are padding.
            shallow: Use the features of these rows.
            keep: Keep the features of these rows for later calls; ignored with ``shallow``.

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
