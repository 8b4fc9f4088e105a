"""A bundle on one backend in a process of its own, to be timed: ``python -m ldm_export.bench_worker``, see obeying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count

import numpy as np

from ldm_export.obeying import Command, obey
from ldm_export.prompts import PROMPTS
from ldm_runtime.pipeline import LatentDiffusionPipeline

MIDDLE = 500
"""The timestep of a single UNet call; which one it is does not change the work."""


def start(settings: Command) -> tuple[Callable[[Command], Callable[[], object]], Command]:
    """Load the pipeline that ``settings`` describe: bundle, backend, precision, device, threads, height, width."""
    options = {name: settings[name] for name in ("backend", "precision", "device", "threads")}
    pipeline = LatentDiffusionPipeline.from_bundle(settings["bundle"], **options)
    task = _Task(pipeline, settings.get("height"), settings.get("width"))
    facts = {"choice": pipeline.choice.facts()} if pipeline.choice else {}
    return task.ready, facts


class _Task:
    def __init__(self, pipeline: LatentDiffusionPipeline, height: int | None, width: int | None):
        self.pipeline, self.size, self._number = pipeline, {"height": height, "width": width}, count()

    def ready(self, command: Command) -> Callable[[], object]:
        """The call for ``command``: what, batch (images), guidance, and of "image" steps, eta and seed."""
        what, batch = command["what"], command["batch"]
        rows = batch if command["guidance"] == 1 else 2 * batch
        rng, geometry = np.random.default_rng(0), self.pipeline.geometry
        sides = [
            axis.opt if pixels is None else pixels // geometry.factor
            for axis, pixels in ((geometry.height, self.size["height"]), (geometry.width, self.size["width"]))
        ]
        latents = rng.standard_normal((batch, geometry.channels, *sides)).astype(np.float32)
        if what == "text_encoder":
            tokens = self.pipeline.tokenizer(self._prompts(1))
            return lambda: self.pipeline.backends["text_encoder"].run({"input_ids": tokens}) and None
        if what == "decoder":
            return lambda: self.pipeline.backends["decoder"].run({"latents": latents}) and None
        if what == "image":
            return lambda: self._image(command)
        (context,) = (
            self.pipeline.backends["text_encoder"]
            .run({"input_ids": self.pipeline.tokenizer(self._prompts(1))})
            .values()
        )
        conditioning = self.pipeline.unet.encode(np.repeat(context, rows, axis=0))
        if what == "conditioning":
            return lambda: self.pipeline.unet.encode(np.repeat(context, rows, axis=0)) and None
        sample = np.concatenate([latents] * (rows // batch))
        return lambda: self._step(sample, conditioning)

    def _step(self, sample: np.ndarray, conditioning: dict) -> None:
        self.pipeline.unet(sample, np.full(len(sample), MIDDLE, np.int64), conditioning)

    def _image(self, command: Command) -> None:
        self.pipeline(
            self._prompts(command["batch"]),
            seed=command["seed"],
            eta=command["eta"],
            guidance_scale=command["guidance"],
            num_inference_steps=command["steps"],
            **self.size,
        )

    def _prompts(self, number: int) -> Sequence[str]:
        """Prompts that no call had before, as different users' would be."""
        return [f"{PROMPTS[index % len(PROMPTS)]}, number {next(self._number)}" for index in range(number)]


if __name__ == "__main__":
    obey(start)
