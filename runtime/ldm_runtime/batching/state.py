"""Sampler state of all images of a batch, advanced together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["BatchState"]

F32 = NDArray[np.float32]


class BatchState:
    """The state of every image: ``slots`` arrays; slot 0 contains the latents (see ``Trajectory``).

    Args:
        capacity: Maximum number of images.
        shape: Shape of one image's latents, (C, h, w).
    """

    def __init__(self, capacity: int, shape: tuple[int, ...]):
        self._arrays: F32 = np.zeros((1, capacity, *shape), np.float32)
        self._next = np.zeros_like(self._arrays)
        self._term: F32 = np.zeros((capacity, *shape), np.float32)

    @property
    def slots(self) -> int:
        """Number of arrays per image: the largest that any trajectory in the batch has needed."""
        return len(self._arrays)

    @property
    def latents(self) -> F32:
        """Latents of all images, float32 [capacity, C, h, w]; a view that ``advance`` invalidates."""
        latents: F32 = self._arrays[0]
        return latents

    def get(self, images: slice, slots: int) -> list[F32]:
        """Views of the first ``slots`` arrays of some images, float32 [images, C, h, w] each."""
        return list(self._arrays[:slots, images])

    def put(self, images: slice, state: Sequence[F32]) -> None:
        """Replace the state of some images; slots beyond ``state`` become zero.

        Args:
            images: Where the images lie.
            state: float32 [images, C, h, w] for each slot.
        """
        if len(state) > self.slots:
            added = np.zeros((len(state) - self.slots, *self._arrays.shape[1:]), np.float32)
            self._arrays = np.concatenate([self._arrays, added])
            self._next = np.zeros_like(self._arrays)
        for slot in range(self.slots):
            self._arrays[slot, images] = state[slot] if slot < len(state) else 0

    def move(self, source: slice, target: slice) -> None:
        """Copy the state of some images to another place; the two may overlap."""
        self._arrays[:, target] = self._arrays[:, source]

    def advance(self, rows: F32, prediction: F32, noise: F32 | None) -> None:
        """Advance the first images by one step of their trajectories, whose x0 is neither clipped nor thresholded.

        The arithmetic is that of ``Trajectory.step``: float32 terms in the order state, prediction, noise, without the
        terms whose coefficient is zero.

        Args:
            rows: float32 [images, slots, slots + 3], each image's ``Trajectory.rows`` at its step (``padded_rows``).
            prediction: Model output after guidance, float32 [images, C, h, w].
            noise: Standard normal noise of that shape, read only where its coefficient is not zero; None if all are
                zero.
        """
        count = len(rows)
        nonzero = rows != 0
        some, every = nonzero.any(axis=0), nonzero.all(axis=0)
        arrays = (*self._arrays[:, :count], prediction, None, noise)
        for slot in range(self.slots):
            target, started = self._next[slot, :count], False
            for column in np.flatnonzero(some[slot]).tolist():
                array = arrays[column]
                assert array is not None
                weights = rows[:, slot, column].reshape(-1, 1, 1, 1)
                if every[slot, column]:
                    product = np.multiply(weights, array, out=self._term[:count] if started else target)
                    if started:
                        target += product
                else:
                    if not started:
                        target[:] = 0
                    chosen = np.flatnonzero(nonzero[:, slot, column])
                    target[chosen] += weights[chosen] * array[chosen]
                started = True
            if not started:
                target[:] = 0
        self._arrays, self._next = self._next, self._arrays
