"""Inputs for timing a single component: the number of rows for a batch of images, and random arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.model import DENOISERS, ModelDescription
from ldm_runtime.specs import Axis, ComponentSpec

__all__ = ["component_rows", "feed_at", "rows_axis"]


def component_rows(model: ModelDescription, component: str, images: int, branches: int, steps: int) -> int:
    """Return the number of rows of a component's calls in a generation, limited by what its graph takes.

    1. A component that encodes a conditioning runs for one prompt at a time.
    2. The UNet and the components that derive its inputs from a conditioning take a row per image and branch.
    3. A component that runs once per schedule takes a row per timestep.
    4. All others take a row per image.

    Args:
        model: The model.
        component: Name of the component.
        images: Images of the batch.
        branches: Guidance branches that are evaluated: 1 without guidance.
        steps: Denoising steps.
    """
    spec = model.components[component]
    if component in {entry.component for entry in model.conditioning}:
        return 1
    if spec.runs == "schedule":
        axis = rows_axis(spec)
        return min(steps, axis.max) if axis else steps
    return images * branches if component in DENOISERS or spec.runs == "request" else images


def rows_axis(spec: ComponentSpec) -> Axis | None:
    """Return the leading axis of a component's inputs, or None if it is fixed."""
    dim = spec.inputs[0].shape[0]
    return dim if isinstance(dim, Axis) else None


def feed_at(spec: ComponentSpec, sizes: Mapping[str, int], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return random inputs: normal floats, integers 0 or 1. The time of a component does not depend on the values.

    Args:
        spec: Inputs of the component.
        sizes: Axis name -> value of the axis. Missing axes have their usual value.
        seed: Seed of the values.
    """
    rng = np.random.default_rng(seed)
    feed: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        shape = [sizes.get(d.name, d.opt) * d.scale if isinstance(d, Axis) else d for d in tensor.shape]
        dtype = np.dtype(tensor.dtype)
        values = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
        feed[tensor.name] = values.astype(dtype)
    return feed
