"""Collects the inputs that the components of a model receive for real requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_export.requests import RequestFields
from ldm_runtime.backends import Backend, Feed, SpecBackend
from ldm_runtime.conditioning import StartImageConditioner
from ldm_runtime.errors import SpecError
from ldm_runtime.model import DECODER, DEEP_FEATURES, LATENTS, SAFETY_CHECKER, SAMPLE, SHALLOW_UNET, TIMESTEP, UNET
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.request import Request
from ldm_runtime.specs import ComponentSpec

__all__ = ["MAX_REQUESTS", "RealFeeds", "real_feeds", "with_start_images"]

MAX_REQUESTS = 8
"""Maximum number of requests for which inputs are collected."""
STEPS = 4
"""Minimum number of denoising steps of the schedule from which timesteps are taken."""

START_STRENGTH = 0.75
"""Strength of the added requests that start from an image."""


@dataclass(frozen=True, eq=False)
class RealFeeds:
    """Inputs for real requests; each array has the rows of all requests.

    Attributes:
        components: Component -> its inputs, in the order in which the components run.
        sources: Tensor -> array of the tensors from which all others are derived: inputs and outputs of the encoders,
            sample, timestep and latents. They include the inputs of the whole UNet before components are split off.
    """

    components: Mapping[str, Feed]
    sources: Mapping[str, NDArray[Any]]


class _Recorder(SpecBackend):
    """Runs a backend and records its inputs."""

    def __init__(self, backend: Backend, spec: ComponentSpec):
        self._backend, self._spec = backend, spec
        self.feeds: list[Feed] = []

    def run(self, feed: Feed) -> dict[str, NDArray[Any]]:
        self.feeds.append({name: np.array(array) for name, array in feed.items()})
        return self._backend.run(feed)

    def close(self) -> None:
        self._backend.close()


def real_feeds(
    pipeline: LatentDiffusionPipeline, files: Callable[[str], Path], requests: Sequence[RequestFields]
) -> RealFeeds:
    """Run all components of a pipeline except the denoisers and the decoder, and collect the inputs of all components.

    Image ``i`` has the seed ``i``. The UNet's samples, deep features and the decoder's latents are standard normal
    noise; timesteps run from the start of a schedule to its end.

    Args:
        pipeline: The pipeline; it is not modified.
        files: Returns the path of a file that a conditioning names; see ``Bundle.file``.
        requests: Requests for one image each; the first ``MAX_REQUESTS`` are used.

    Raises:
        SpecError: No requests, or a field that the model does not take.
        BackendError: The engine failed.
    """
    requests = requests[:MAX_REQUESTS]
    if not requests:
        raise SpecError("requests: got none, expected at least one to measure with")
    requests = with_start_images(pipeline, requests, max(STEPS, len(requests)))
    model = pipeline.model
    recorders = {name: _Recorder(backend, model.components[name]) for name, backend in pipeline.backends.items()}
    recording = LatentDiffusionPipeline(model, recorders, files)
    rng, rows, sources = np.random.default_rng(0), list[Feed](), list[Feed]()
    steps = max(STEPS, len(requests))
    for index, fields in enumerate(requests):
        plan = recording.plan(
            Request(**{**recording.example(fields), **fields, "seed": index, "num_inference_steps": steps})
        )
        encoded = recording.encode(plan, recording.begin(plan))
        conditioning = recording.denoiser.condition(encoded)
        place = index * (len(plan.trajectory) - 1) // max(1, len(requests) - 1)
        timestep = recording.denoiser.timesteps(plan.trajectory.timesteps[place : place + 1])
        schedule = recording.denoiser.embed(timestep)
        latents = rng.standard_normal(plan.shape).astype(np.float32)
        sample = np.concatenate([latents] * len(plan.branches))
        embedded = {name: np.repeat(array, plan.rows, axis=0) for name, array in schedule.items()}
        rows.append({SAMPLE: sample, **embedded, **conditioning})
        sources.append({SAMPLE: sample, TIMESTEP: np.repeat(timestep, plan.rows), **encoded, LATENTS: latents})
    feeds = {name: _joined(one.feeds) for name, one in recorders.items() if one.feeds}
    encoders = [feeds[entry.component] for entry in model.conditioning if entry.component in feeds]
    whole = {name: array for feed in (*encoders, _joined(sources)) for name, array in feed.items()}
    feeds |= {UNET: _joined(rows), DECODER: {LATENTS: whole[LATENTS]}}
    if SHALLOW_UNET in model.components:
        inputs = model.components[SHALLOW_UNET].inputs
        sample, channels = feeds[UNET][SAMPLE], {tensor.name: tensor.bounds("opt")[1] for tensor in inputs}
        features = rng.standard_normal((len(sample), channels[DEEP_FEATURES], *sample.shape[2:])).astype(np.float32)
        known = {**feeds[UNET], DEEP_FEATURES: features}
        feeds[SHALLOW_UNET] = {tensor.name: known[tensor.name] for tensor in inputs}
    if SAFETY_CHECKER in model.components:
        (pixels,) = model.components[SAFETY_CHECKER].inputs
        shape = (len(requests), *pixels.bounds("opt")[1:])
        feeds[SAFETY_CHECKER] = {pixels.name: rng.uniform(0, 255, shape).astype(np.float32)}
        whole |= feeds[SAFETY_CHECKER]
    return RealFeeds({name: feeds[name] for name in model.components if name in feeds}, whole)


def with_start_images(
    pipeline: LatentDiffusionPipeline, requests: Sequence[RequestFields], steps: int
) -> tuple[RequestFields, ...]:
    """Add requests that start from an image, with and without a mask, if the model supports it and none does so yet.

    Args:
        pipeline: The model.
        requests: At least one.
        steps: Denoising steps, of which the added requests skip some.
    """
    starts = [one for one in pipeline.conditioners if isinstance(one, StartImageConditioner) and not one.needs_mask]
    if any("image" in request for request in requests):
        return tuple(requests)
    strength = START_STRENGTH if steps > 1 else 1.0
    added = [fields for one in starts for fields in one.examples()]
    return (*requests, *({**requests[0], **fields, "strength": strength} for fields in added))


def _joined(feeds: Sequence[Feed]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
