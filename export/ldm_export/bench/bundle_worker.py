"""Worker process that times a bundle on one backend: ``python -m ldm_export.bench.bundle_worker``.

It uses the protocol of ``worker_process.serve_commands``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from ldm_export.bench.component_feeds import feed_at, rows_axis
from ldm_export.bench.worker_process import Command, serve_commands
from ldm_export.prompts import PROMPTS
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["IMAGE", "start"]

IMAGE = "image"
"""Name of the part that is a whole generation, from prompts to pixels. All other parts are components."""


def start(settings: Command) -> tuple[Callable[[Command], Callable[[], object]], Command]:
    """Load the pipeline that ``settings`` describe: bundle, backend, precision, device and threads."""
    options = {name: settings[name] for name in ("backend", "precision", "device", "threads")}
    pipeline = LatentDiffusionPipeline.from_bundle(settings["bundle"], **options)
    for backend in pipeline.backends.values():
        if isinstance(backend, LazyBackend):
            backend.load()  # "auto" takes another engine now if this one does not load
    facts = {"choice": pipeline.choice.facts()} if pipeline.choice else {}
    return _Parts(pipeline).prepare, facts


class _Parts:
    """Prepares the calls that are timed."""

    def __init__(self, pipeline: LatentDiffusionPipeline):
        self._pipeline, self._number = pipeline, count()

    def prepare(self, command: Command) -> Callable[[], object]:
        """Return the call for a command.

        The command has ``part``, a component or ``IMAGE``; for a component ``rows``, ``height`` and ``width``; for
        ``IMAGE`` also ``batch`` and ``options``, other fields of ``Request``. Height and width are in pixels, None for
        the model's own size.
        """
        if command["part"] == IMAGE:
            return lambda: self._generate(command)
        geometry, backend = self._pipeline.geometry, self._pipeline.backends[command["part"]]
        spec = self._pipeline.model.components[command["part"]]
        sizes = {
            axis.name: geometry.latents_of(side, command[side])
            for side, axis in (("height", geometry.height), ("width", geometry.width))
        }
        if axis := rows_axis(spec):
            sizes[axis.name] = command["rows"]
        feed = feed_at(spec, sizes)
        return lambda: backend.run(feed) is None

    def _generate(self, command: Command) -> None:
        self._pipeline(
            **self._images(command["batch"]),
            **command["options"],
            height=command["height"],
            width=command["width"],
        )

    def _images(self, number: int) -> dict[str, Any]:
        """Return the fields of a ``Request`` for a number of images, with prompts that no earlier call had."""
        conditioners = self._pipeline.conditioners
        if not conditioners:
            return {"count": number}
        if not any("prompts" in conditioner.fields for conditioner in conditioners):
            return {**self._pipeline.example(), "images_per_prompt": number}
        prompts = [f"{PROMPTS[i % len(PROMPTS)]}, number {next(self._number)}" for i in range(number)]
        return {**self._pipeline.example(("prompts",)), "prompts": prompts}


if __name__ == "__main__":
    serve_commands(start)
