"""The UNet of a bundle as one function, put together from the components that it was split into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend

__all__ = ["SPLIT", "run_unet"]

SPLIT = ("cross_attention_kv", "time_embedding")
"""Components that are split off the UNet with cross-attention."""


def run_unet(backends: Mapping[str, Backend], feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """Run sample, timestep and context through the split components and the UNet."""
    derived = dict(backends["cross_attention_kv"].run({"context": feed["context"]}))
    derived |= backends["time_embedding"].run({"timestep": feed["timestep"]})
    return backends["unet"].run({"sample": feed["sample"], **derived})
