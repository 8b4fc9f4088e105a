"""A bundle that the server has loaded: its pipeline, its batch scheduler, and what clients are told about it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_runtime.batching.limits import Limits, rows_of_call
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.model import UNET
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["EngineOptions", "ServedModel", "open_models"]


@dataclass(frozen=True)
class EngineOptions:
    """Options of ``LatentDiffusionPipeline.from_bundle`` and of the batch scheduler; None takes the default."""

    precision: str | None = None
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    max_rows: int | None = None
    max_queue: int = 256


class ServedModel:
    """A loaded model.

    Args:
        name: Name in the API.
        pipeline: The pipeline; closed with the model.
        scheduler: Its batch scheduler.
    """

    def __init__(self, name: str, pipeline: LatentDiffusionPipeline, scheduler: BatchScheduler):
        self.name, self.pipeline, self.scheduler = name, pipeline, scheduler
        self.created = int(time.time())
        self.kinds = tuple(entry.kind for entry in pipeline.model.conditioning)
        self.fields = frozenset(field for one in pipeline.conditioners for field in one.fields)

    @classmethod
    def open(cls, path: Path, name: str, options: EngineOptions) -> ServedModel:
        """Load a bundle and generate a test image.

        Raises:
            LdmError: The bundle is damaged, or it does not run here.
        """
        bundle = Bundle.open(path)
        rows = rows_of_call(bundle.manifest.components[UNET].spec, options.max_rows, f"the UNet of {name}")
        pipeline = LatentDiffusionPipeline.from_bundle(
            bundle,
            precision=options.precision,
            backend=options.backend,
            device=options.device,
            threads=options.threads,
        )
        try:
            return cls(name, pipeline, BatchScheduler(pipeline, Limits(max_rows=rows, max_queue=options.max_queue)))
        except BaseException:
            pipeline.close()
            raise

    def facts(self) -> dict[str, Any]:
        """The entry of ``/v1/models``; "ldm" holds what OpenAI's format has no place for.

        Height and width are minimum, default and maximum in pixels; sides are multiples of "multiple".
        """
        model = self.pipeline.model
        geometry = self.pipeline.geometry
        sizes = {
            side: [size * geometry.factor for size in (axis.min, axis.opt, axis.max)]
            for side, axis in (("height", geometry.height), ("width", geometry.width))
        }
        choice = self.pipeline.choice
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "ldm-export",
            "ldm": {
                "family": model.family,
                "conditioning": self.kinds,
                "guidance": bool(model.guidance),
                **sizes,
                "multiple": geometry.factor,
                "defaults": asdict(model.defaults),
                "engine": choice.facts() if choice else None,
            },
        }

    def close(self, seconds: float = 0.0) -> None:
        """Finish the running requests within ``seconds``, cancel the others, and free the engines."""
        self.scheduler.close(seconds)
        self.pipeline.close()


def open_models(paths: Sequence[Path], options: EngineOptions) -> dict[str, ServedModel]:
    """Load bundles, each under the name of its folder; if one fails, the others are closed.

    Raises:
        SpecError: Two folders have one name.
        LdmError: A bundle is damaged, or it does not run here.
    """
    names = [path.resolve().name for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SpecError(f"bundles: got two folders named {twice[0]!r:.60}, expected different names; rename one")
    models: dict[str, ServedModel] = {}
    try:
        for name, path in zip(names, paths, strict=True):
            models[name] = ServedModel.open(path, name, options)
    except BaseException:
        for model in models.values():
            model.close()
        raise
    return models
