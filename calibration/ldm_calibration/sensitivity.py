"""How much each layer alone, quantized, moves the final latents of whole trajectories."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ldm_calibration.qdq import Scaling, insert_qdq
from ldm_calibration.sessions import Session, SessionBackend, load_graph
from ldm_calibration.settings import Settings
from ldm_calibration.trajectories import Model
from ldm_runtime.backends import Backend
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.request import Request

PROMPTS, STEPS = 4, 10
"""Trajectories that each layer is tried on, and their denoising steps."""


def unet_sensitivity(
    model: Model,
    settings: Settings,
    sources: Mapping[str, Scaling],
    results: Mapping[str, Scaling],
    layers: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Layer → signal-to-noise ratio in dB of the final latents with that layer alone in int8; the lower the worse."""
    exact = _latents(model, settings, {})
    found = {}
    for done, layer in enumerate(layers):
        progress(done, len(layers))
        latents = _latents(model, settings, {"unet": int8_backend(model, "unet", sources, results, [layer])})
        error = float(np.square(latents - exact, dtype=np.float64).sum())
        power = float(np.square(exact, dtype=np.float64).sum())
        found[layer] = 10 * math.log10(max(power, 1e-30) / max(error, 1e-30))
    progress(len(layers), len(layers))
    return found


def int8_backend(
    model: Model, component: str, sources: Mapping[str, Scaling], results: Mapping[str, Scaling], layers: Sequence[str]
) -> Backend:
    """A component with these layers in int8, on ONNX Runtime; made when it is first used."""

    def made() -> Backend:
        graph = load_graph(model.graphs[component])
        insert_qdq(graph, sources, results, layers)
        return SessionBackend(Session(graph, model.graphs[component].parent), model.specs[component])

    return LazyBackend(model.specs[component], made)


def _latents(model: Model, settings: Settings, changed: Mapping[str, Backend]) -> np.ndarray:
    prompts = settings.prompts[:PROMPTS]
    found = []
    cheap = {"decoder": _Undecoded(model)}
    with model.pipeline({**cheap, **changed}) as pipeline:
        for texts, seeds in model.batches(prompts):
            request = Request(
                texts,
                seed=seeds,
                eta=settings.eta,
                guidance_scale=settings.guidance_scale,
                num_inference_steps=min(STEPS, settings.steps),
            )
            *_, last = pipeline.steps(request)
            found.append(last.latents)
    return np.concatenate(found)


class _Undecoded:
    """Stands where a decoder would: these trajectories end with their latents."""

    def __init__(self, model: Model):
        self.inputs, self.outputs = model.specs["decoder"].inputs, model.specs["decoder"].outputs

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {}

    def close(self) -> None:
        pass
