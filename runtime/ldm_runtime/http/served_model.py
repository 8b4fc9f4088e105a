"""A loaded version of a bundle: its pipeline, its batch scheduler, and its description for clients."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm_runtime.batching.job import Job
from ldm_runtime.batching.limits import Limits, rows_of_call
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import MANIFEST
from ldm_runtime.errors import ManifestError
from ldm_runtime.geometry import Geometry
from ldm_runtime.manifest_reader import MAX_BYTES
from ldm_runtime.model import UNET, ModelDescription
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.pipeline_options import BundleOptions
from ldm_runtime.regular_files import read_regular
from ldm_runtime.required_memory import bundle_bytes

__all__ = ["ModelOptions", "ServedModel", "model_facts", "version_of"]


@dataclass(frozen=True)
class ModelOptions:
    """How a bundle is opened and batched.

    Attributes:
        bundle: Options of ``LatentDiffusionPipeline.from_bundle``.
        max_rows: Maximum rows of a UNet call; None takes the default of ``rows_of_call``.
        max_queue: Maximum number of waiting requests.
    """

    bundle: BundleOptions = field(default_factory=BundleOptions)
    max_rows: int | None = None
    max_queue: int = 256


class ServedModel:
    """A loaded model: one version of a bundle.

    Requests hold it, so that it is closed only after the last one has ended.

    Args:
        name: Name in the API.
        pipeline: The pipeline; closed with the model.
        scheduler: Its batch scheduler.
        version: Digest of the bundle's manifest, "" if there is none.
        memory: Estimated bytes of memory.
    """

    def __init__(
        self,
        name: str,
        pipeline: LatentDiffusionPipeline,
        scheduler: BatchScheduler,
        version: str = "",
        memory: int = 0,
    ):
        self.name, self.pipeline, self.scheduler, self.version, self.memory = name, pipeline, scheduler, version, memory
        self.created = int(time.time())
        self.kinds = tuple(entry.kind for entry in pipeline.model.conditioning)
        self.fields = frozenset(field for one in pipeline.conditioners for field in one.fields)
        self._lock, self._closing = threading.Lock(), threading.Lock()
        self._holders, self._closed = 0, False
        self._on_idle: Callable[[], None] | None = None

    @classmethod
    def open(cls, path: Path, name: str, options: ModelOptions) -> ServedModel:
        """Load all components of a bundle and generate a test image; its files are not needed afterwards.

        Raises:
            LdmError: The bundle is damaged, it was replaced meanwhile, or it does not run here.
        """
        version = version_of(path) if (path / MANIFEST).is_file() else ""
        bundle = Bundle.open(path)
        rows = rows_of_call(bundle.manifest.components[UNET].spec, options.max_rows, f"the UNet of {name}")
        pipeline = LatentDiffusionPipeline.from_bundle(bundle, **options.bundle)
        try:
            scheduler = BatchScheduler(pipeline, Limits(max_rows=rows, max_queue=options.max_queue))
            try:
                pipeline.load()
                if version_of(path) != version:
                    raise ManifestError(f"{path}: the bundle was replaced while it was loaded; load it again")
            except BaseException:
                scheduler.close()
                raise
        except BaseException:
            pipeline.close()
            raise
        graph = None if pipeline.choice is None else pipeline.choice.graph
        return cls(name, pipeline, scheduler, version, bundle_bytes(bundle, graph))

    def facts(self) -> dict[str, Any]:
        """The entry of ``/v1/models``, as ``model_facts``."""
        return model_facts(self.name, self.pipeline.model, self)

    @property
    def idle(self) -> bool:
        """True if no request holds the model."""
        return self._holders == 0

    def hold(self) -> None:
        """Keep the model open. Every call needs a call of ``release``."""
        with self._lock:
            self._holders += 1

    def hold_for(self, job: Job) -> None:
        """Keep the model open until a job has ended."""
        self.hold()
        job.future.add_done_callback(lambda future: self.release())

    def release(self) -> None:
        """Undo one ``hold``."""
        with self._lock:
            self._holders -= 1
            on_idle = self._on_idle if self._holders == 0 else None
        if on_idle is not None:
            on_idle()

    def when_idle(self, then: Callable[[], None]) -> None:
        """Call a function when no request holds the model: now, or later in the thread that releases it.

        New requests must not hold the model afterwards.
        """
        with self._lock:
            self._on_idle = then
            idle = self._holders == 0
        if idle:
            then()

    def close(self, seconds: float = 0.0) -> None:
        """Finish the running requests within ``seconds``, cancel the others, and free the engines."""
        with self._closing:
            if not self._closed:
                self.scheduler.close(seconds)
                self.pipeline.close()
                self._closed = True


def model_facts(name: str, model: ModelDescription, loaded: ServedModel | None) -> dict[str, Any]:
    """The entry of ``/v1/models``; "ldm" contains facts that OpenAI's format does not have.

    "height" and "width" are minimum, default and maximum in pixels; both must be multiples of "multiple".

    Args:
        name: Name in the API.
        model: Description of the model.
        loaded: The loaded version; None if its first request will load one.
    """
    choice = None if loaded is None else loaded.pipeline.choice
    record = None if loaded is None else loaded.pipeline.record
    geometry = Geometry.of(model)
    sizes = {
        side: [size * geometry.factor for size in (axis.min, axis.opt, axis.max)]
        for side, axis in (("height", geometry.height), ("width", geometry.width))
    }
    return {
        "id": name,
        "object": "model",
        "created": 0 if loaded is None else loaded.created,
        "owned_by": "ldm-export",
        "ldm": {
            "family": model.family,
            "conditioning": tuple(entry.kind for entry in model.conditioning),
            "guidance": bool(model.guidance),
            **sizes,
            "multiple": geometry.factor,
            "defaults": asdict(model.defaults),
            "measured": [] if record is None or choice is None else record.facts_of(choice.precision),
            "engine": choice.facts() if choice else None,
            "version": loaded.version if loaded else None,
            "loaded": loaded is not None,
        },
    }


def version_of(path: Path) -> str:
    """SHA-256 (hex) of a bundle's manifest, which identifies the version: the manifest has the digests of all files.

    Raises:
        ManifestError: It cannot be read.
    """
    return hashlib.sha256(read_regular(path / MANIFEST, MAX_BYTES, ManifestError)).hexdigest()
