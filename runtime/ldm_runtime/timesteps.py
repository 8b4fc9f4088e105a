"""Converts timesteps to the dtype of a model's graphs: integers, or float32 for schedulers with fractional ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.model import TIMESTEP, UNET, ModelDescription

__all__ = ["model_timesteps", "timestep_dtype"]


def timestep_dtype(model: ModelDescription) -> str:
    """Return the dtype of the input ``timestep`` of a model's UNet or of the component that embeds it."""
    specs = (*model.once_per("schedule"), model.components[UNET])
    return next((tensor.dtype for spec in specs for tensor in spec.inputs if tensor.name == TIMESTEP), "int64")


def model_timesteps(timesteps: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Convert timesteps [N] to ``dtype``.

    Raises:
        SpecError: A timestep is fractional, and ``dtype`` is an integer type.
    """
    converted = timesteps.astype(dtype)
    if np.issubdtype(converted.dtype, np.integer) and (converted != timesteps).any():
        fractional = timesteps[int(np.argmax(converted != timesteps))]
        raise SpecError(
            f"scheduler: got the fractional timestep {fractional:g}, but this bundle's UNet takes whole ones; build "
            "the bundle with this scheduler, or use timestep_spacing 'trailing' or 'leading' without resampled sigmas"
        )
    return converted
