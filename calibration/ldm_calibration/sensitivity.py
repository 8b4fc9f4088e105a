"""Sensitivity of the denoiser's layers: how much the final latents change if only one layer is quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.graph_files import load_graph
from ldm_calibration.model import CalibrationModel
from ldm_calibration.qdq import QuantizedTensors, insert_qdq
from ldm_calibration.sessions import Session, SessionBackend
from ldm_calibration.settings import CalibrationSettings
from ldm_runtime.backends import Backend
from ldm_runtime.backends.lazy import LazyBackend

__all__ = ["int8_backend", "measure_sensitivity"]

IMAGES, STEPS = 4, 10
"""Number of images with which each layer is tried, and maximum number of their denoising steps."""


def measure_sensitivity(
    model: CalibrationModel,
    settings: CalibrationSettings,
    component: str,
    tensors: QuantizedTensors,
    layers: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Measure the signal-to-noise ratio of the final latents in dB with a single layer in int8, for each layer.

    A lower ratio means a more sensitive layer.

    Args:
        model: The model.
        settings: Requests, steps, eta and guidance scale.
        component: The denoiser.
        tensors: Scalings of the component's tensors.
        layers: Names of layers of the component.
        on_progress: Called with the number of finished layers and of all ``layers``.

    Returns:
        Layer -> dB.
    """
    exact = _latents(model, settings, {})
    decibels = {}
    for done, layer in enumerate(layers):
        on_progress(done, len(layers))
        latents = _latents(model, settings, {component: int8_backend(model, component, tensors, [layer])})
        error = float(np.square(latents - exact, dtype=np.float64).sum())
        power = float(np.square(exact, dtype=np.float64).sum())
        decibels[layer] = 10 * math.log10(max(power, 1e-30) / max(error, 1e-30))
    on_progress(len(layers), len(layers))
    return decibels


def int8_backend(model: CalibrationModel, component: str, tensors: QuantizedTensors, layers: Sequence[str]) -> Backend:
    """Return a component with these layers in int8 on ONNX Runtime; the graph is created on first use."""

    def load() -> Backend:
        graph = load_graph(model.graphs[component])
        insert_qdq(graph, tensors, layers)
        return SessionBackend(Session(graph, model.graphs[component].parent), model.spec(component))

    return LazyBackend(model.spec(component), load)


def _latents(
    model: CalibrationModel, settings: CalibrationSettings, changed: Mapping[str, Backend]
) -> NDArray[np.float32]:
    latents = []
    sampling: dict[str, Any] = {
        "eta": settings.eta,
        "guidance_scale": settings.guidance_scale,
        "num_inference_steps": min(STEPS, settings.steps),
    }
    with model.pipeline(changed) as pipeline:
        for batch in model.batches(settings.requests[:IMAGES]):
            *_, last = pipeline.steps(batch.request(0, **sampling))
            latents.append(last.latents)
    return np.concatenate(latents)
