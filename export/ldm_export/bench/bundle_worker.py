"""A bundle on one backend, timed in a process of its own: ``python -m ldm_export.bench.bundle_worker``, see obeying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ldm_export.bench.worker_process import Command, obey
from ldm_export.demo import default_prompts
from ldm_runtime.bundle import Bundle
from ldm_runtime.pipeline import LatentDiffusionPipeline

MIDDLE = 500
"""The timestep of a single UNet call; which one it is does not change the work."""


def start(settings: Command) -> tuple[Callable[[Command], Callable[[], object]], Command]:
    """Load the pipeline that ``settings`` describe: bundle, backend, precision, device, threads."""
    options = {name: settings[name] for name in ("backend", "precision", "device", "threads")}
    bundle = Bundle.open(settings["bundle"])
    pipeline = LatentDiffusionPipeline.from_bundle(bundle, **options)
    facts = {"choice": pipeline.choice.facts()} if pipeline.choice else {}
    return _Timed(pipeline, default_prompts(bundle)).ready, facts


class _Timed:
    def __init__(self, pipeline: LatentDiffusionPipeline, texts: Sequence[str]):
        self.pipeline, self._texts, self._number = pipeline, texts, count()

    def ready(self, command: Command) -> Callable[[], object]:
        """The call for a command: what, batch, guidance, height and width (pixels or null), steps, eta, seed."""
        backends = self.pipeline.backends
        if command["what"] == "text_encoder":
            tokens = self.pipeline.tokenizer(self._prompts(1))
            return lambda: backends["text_encoder"].run({"input_ids": tokens}) is None
        if command["what"] == "decoder":
            latents = self._latents(command)
            return lambda: backends["decoder"].run({"latents": latents}) is None
        if command["what"] == "image":
            return lambda: self._image(command)
        sample = self._latents(command)
        if command["guidance"] != 1:
            sample = np.concatenate([sample, sample])
        (states,) = self.pipeline.texts.encode(self._prompts(1)).values()
        context = np.repeat(states, len(sample), axis=0)
        if command["what"] == "conditioning":
            return lambda: self.pipeline.unet.encode(context) is None
        conditioning = self.pipeline.unet.encode(context)
        timestep = np.full(len(sample), MIDDLE, np.int64)
        return lambda: self.pipeline.unet(sample, timestep, conditioning) is None

    def _image(self, command: Command) -> None:
        self.pipeline(
            self._prompts(command["batch"]),
            guidance_scale=command["guidance"],
            num_inference_steps=command["steps"],
            **{name: command[name] for name in ("seed", "eta", "height", "width")},
        )

    def _latents(self, command: Command) -> NDArray[np.float32]:
        geometry = self.pipeline.geometry
        sides = [
            axis.opt if command[name] is None else command[name] // geometry.factor
            for name, axis in (("height", geometry.height), ("width", geometry.width))
        ]
        shape = (command["batch"], geometry.channels, *sides)
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def _prompts(self, number: int) -> list[str]:
        """Prompts that no call had before, as different users' would be."""
        return [f"{self._texts[index % len(self._texts)]}, number {next(self._number)}" for index in range(number)]


if __name__ == "__main__":
    obey(start)
