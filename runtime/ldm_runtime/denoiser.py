"""The denoiser: the UNet, and components whose results are computed once per request or per schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.errors import BackendError
from ldm_runtime.model import DEEP_FEATURES, NOISE_PRED, SAMPLE, SHALLOW_UNET, TIMESTEP, UNET, ModelDescription
from ldm_runtime.timesteps import model_timesteps, timestep_dtype

__all__ = ["Denoiser", "Tensors"]

F32 = NDArray[np.float32]
Tensors = dict[str, NDArray[Any]]
"""Tensor name -> array whose leading axis is rows (or timesteps)."""


class Denoiser:
    """Predicts noise with the UNet, and runs the components that derive its inputs.

    ``conditioning`` tensors (e.g. cross-attention keys and values) come from components that run once per request,
    ``schedule`` tensors (e.g. projected timestep embeddings) from components that run once per schedule. The model's
    description says which tensors these are, so a UNet that takes ``timestep`` or ``context`` directly works too.

    Args:
        model: Description of the model.
        backends: Component -> its backend.
    """

    def __init__(self, model: ModelDescription, backends: Mapping[str, Backend]):
        self.unet, self._shallow = backends[UNET], backends.get(SHALLOW_UNET)
        self.request_components, self.schedule_components = model.once_per("request"), model.once_per("schedule")
        """Specs of the components that derive UNet inputs, once per request and once per schedule, in their order."""
        self._timestep_dtype = timestep_dtype(model)
        self._inputs = tuple(tensor.name for tensor in model.components[UNET].inputs)
        self._per_request = [(spec, backends[spec.name]) for spec in self.request_components]
        self._per_schedule = [(spec, backends[spec.name]) for spec in self.schedule_components]
        derived = {tensor.name for spec in self.schedule_components for tensor in spec.outputs}
        self.schedule_inputs = tuple(name for name in self._inputs if name == TIMESTEP or name in derived)
        """Names of the UNet's inputs that depend on the timestep alone."""
        self.conditioning_inputs = tuple(name for name in self._inputs if name not in (SAMPLE, *self.schedule_inputs))
        """Names of the UNet's inputs that are constant over the steps of a request."""

    def condition(self, encoded: Mapping[str, NDArray[Any]]) -> Tensors:
        """Derive the UNet's conditioning inputs from the encoded conditioning. The number of rows stays the same.

        Raises:
            SpecError: A component does not take the shapes or dtypes.
            BackendError: The engine failed.
        """
        known = dict(encoded)
        for spec, backend in self._per_request:
            known |= backend.run({tensor.name: known[tensor.name] for tensor in spec.inputs})
        return {name: known[name] for name in self.conditioning_inputs}

    def timesteps(self, timesteps: NDArray[Any]) -> NDArray[Any]:
        """Convert timesteps to the dtype that the model takes.

        Raises:
            SpecError: A timestep is fractional, and the model takes whole ones.
        """
        return model_timesteps(timesteps, self._timestep_dtype)

    def embed(self, timesteps: NDArray[Any]) -> Tensors:
        """Derive the UNet's schedule inputs for timesteps [N]; every array is [N, …].

        Equal timesteps are computed once. Calls have at most as many rows as the components take.

        Raises:
            SpecError, BackendError: As ``condition``; SpecError as ``timesteps``.
        """
        distinct, place = np.unique(self.timesteps(timesteps), return_inverse=True)
        known: Tensors = {TIMESTEP: distinct}
        for spec, backend in self._per_schedule:
            most = min(tensor.bounds("max")[0] for tensor in spec.inputs)
            names = [tensor.name for tensor in spec.inputs]
            parts = [
                backend.run({name: known[name][start : start + most] for name in names})
                for start in range(0, len(distinct), most)
            ]
            known |= {t.name: np.concatenate([part[t.name] for part in parts]) for t in spec.outputs}
        return {name: known[name][place] for name in self.schedule_inputs}

    def __call__(self, sample: F32, schedule: Mapping[str, NDArray[Any]], conditioning: Mapping[str, Any]) -> F32:
        """Predict noise float32 [R, C, h, w] for noisy latents of that shape.

        Args:
            sample: Latents.
            schedule: Schedule inputs of each row, [R, …], selected from the result of ``embed``.
            conditioning: Conditioning inputs of each row, [R, …].

        Raises:
            SpecError: The UNet does not take the shapes or dtypes.
            BackendError: The engine failed.
        """
        predicted: F32 = self.unet.run({SAMPLE: sample, **schedule, **conditioning})[NOISE_PRED]
        return predicted

    def whole(
        self, sample: F32, schedule: Mapping[str, NDArray[Any]], conditioning: Mapping[str, Any]
    ) -> tuple[F32, F32]:
        """Predict noise as ``__call__`` does, and also return deep features float32 [R, F, h, w] for ``shallow``."""
        results = self.unet.run({SAMPLE: sample, **schedule, **conditioning})
        return results[NOISE_PRED], results[DEEP_FEATURES]

    def shallow(
        self, sample: F32, schedule: Mapping[str, NDArray[Any]], conditioning: Mapping[str, Any], features: F32
    ) -> F32:
        """Predict noise with the shallow UNet, from deep features float32 [R, F, h, w] that ``whole`` returned.

        Raises:
            BackendError: The pipeline has no shallow UNet.
        """
        if self._shallow is None:
            raise BackendError(f"pipeline: no backend for {SHALLOW_UNET}; give one, or leave cache_every out")
        known = {SAMPLE: sample, **schedule, **conditioning, DEEP_FEATURES: features}
        predicted: F32 = self._shallow.run({tensor.name: known[tensor.name] for tensor in self._shallow.inputs})[
            NOISE_PRED
        ]
        return predicted

    def close(self) -> None:
        """Free the engines of the UNet and of the components that derive its inputs."""
        for _, backend in (*self._per_request, *self._per_schedule):
            backend.close()
        self.unet.close()
        if self._shallow is not None:
            self._shallow.close()
