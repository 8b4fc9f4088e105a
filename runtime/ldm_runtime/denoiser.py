"""The UNet as denoising loops use it: what is constant over a prompt's steps is computed once, then a call per step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend, Preparing

F32 = NDArray[np.float32]
Conditioning = Mapping[str, NDArray[Any]]
"""Name → what the steps of some rows share; rows are the leading axis: they may be taken and concatenated by key."""


class UNet:
    """Predicts noise with a backend that takes ``sample``, ``timestep`` and ``context``."""

    def __init__(self, backend: Backend):
        self._backend = backend

    def encode(self, context: F32) -> dict[str, NDArray[Any]]:
        """Compute what the steps of these rows share from the text encoder's hidden states, float32 [R, T, D].

        These are the hidden states, and with OpenVINO the keys and values of every cross-attention.

        Raises:
            BackendError: the engine failed.
        """
        given: dict[str, NDArray[Any]] = {"context": context}
        return self._backend.prepare(given) if isinstance(self._backend, Preparing) else given

    def __call__(self, sample: F32, timestep: NDArray[np.int64], conditioning: Conditioning) -> F32:
        """Predicted noise float32 [R, C, h, w] of noisy latents of that shape, each row at its own ``timestep`` [R].

        Raises:
            SpecError: shapes or dtypes that the UNet does not take.
            BackendError: the engine failed.
        """
        feed: dict[str, NDArray[Any]] = {"sample": sample, "timestep": timestep, **conditioning}
        predicted: F32 = self._backend.run(feed)["noise_pred"]
        return predicted
