"""Process of ``peers.py`` that runs a bundle with ldm_runtime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from task import Command, Task, latents

from ldm_export.bench.figures import versions
from ldm_export.bench.worker_process import serve_commands
from ldm_runtime.backends.openvino import has_bf16
from ldm_runtime.pipeline import LatentDiffusionPipeline


def start(settings: Command) -> tuple[Callable[[Command], Callable[[], object]], Command]:
    """Settings: bundle, backend, precision ("float": the fastest except int8), every (guidance_every),
    cache_every, threads."""
    options = {name: settings[name] for name in ("backend", "precision", "threads")}
    if options["precision"] == "float":
        options["precision"] = "bf16" if has_bf16() else "fp32"
    pipeline = LatentDiffusionPipeline.from_bundle(settings["bundle"], **options)
    cache: dict[int, tuple] = {}

    def step(sample: np.ndarray, timestep: int, context: np.ndarray) -> np.ndarray:
        if id(context) not in cache:  # once per prompt and schedule, as the pipeline does
            cache.clear()
            schedule = pipeline.denoiser.embed(np.full(len(sample), timestep, np.int64))
            cache[id(context)] = schedule, pipeline.denoiser.condition({"context": context})
        return pipeline.denoiser(sample, *cache[id(context)])

    def draw(command: Command) -> list:
        options = {name: command[name] for name in ("height", "width")}
        return pipeline(
            command["prompts"],
            eta=0.0,
            guidance_scale=command["guidance"],
            num_inference_steps=command["steps"],
            latents=latents(command),
            guidance_every=settings["every"],
            cache_every=settings["cache_every"],
            **options,
        ).images

    return Task(step, draw).ready, {"tools": versions(), "choice": pipeline.choice.facts()}


if __name__ == "__main__":
    serve_commands(start)
