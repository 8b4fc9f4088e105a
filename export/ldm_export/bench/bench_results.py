"""Settings and results of a benchmark, as JSON values and as a chart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ldm_export.bench.bundle_worker import IMAGE
from ldm_export.bench.figures import Timing, machine, versions
from ldm_export.bench.worker_pool import Facts
from ldm_export.page.chart import Series, bars, lines, sheet
from ldm_runtime.errors import SpecError
from ldm_runtime.model import ModelDescription
from ldm_runtime.number_checks import FLOAT32_MAX, integer, number, threads

__all__ = ["BenchSettings", "Benchmark", "Combination", "Measure"]

MAX_RUNS, MAX_BATCHES, MAX_IMAGES = 1000, 16, 10**6
MAX_SIZE = 2**24


@dataclass(frozen=True)
class Combination:
    """A backend and a precision; None is the precision that the bundle was built for."""

    backend: str
    precision: str | None = None

    @property
    def name(self) -> str:
        """E.g. "openvino bf16"."""
        return f"{self.backend} {self.precision}" if self.precision else self.backend


@dataclass(frozen=True)
class BenchSettings:
    """Settings of a timing run. None selects the model's own value.

    Attributes:
        batches: Numbers of images per call that are timed.
        steps: Denoising steps of a generation.
        runs: Number of rounds.
        guidance_scale: 1 turns guidance off.
        eta: Amount of noise added at each step.
        height, width: Pixels.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads of one operator; None means all cores.

    Raises:
        SpecError: A number is out of range.
    """

    batches: tuple[int, ...] = (1, 2, 4)
    steps: int | None = None
    runs: int = 5
    guidance_scale: float | None = None
    eta: float | None = None
    height: int | None = None
    width: int | None = None
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.batches) <= MAX_BATCHES:
            raise SpecError(f"batch: got {len(self.batches)} of them, expected 1..{MAX_BATCHES}")
        checked: dict[str, Any] = {
            "runs": integer("runs", self.runs, 1, MAX_RUNS),
            "batches": tuple(integer("batch", batch, 1, MAX_IMAGES) for batch in self.batches),
            "threads": threads(self.threads),
        }
        for name in ("steps", "height", "width"):
            if (value := getattr(self, name)) is not None:
                checked[name] = integer(name, value, 1, MAX_SIZE)
        for name, least in (("guidance_scale", -FLOAT32_MAX), ("eta", 0.0)):
            if (value := getattr(self, name)) is not None:
                checked[name] = number(name, value, least)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def for_model(self, model: ModelDescription) -> BenchSettings:
        """Replace None by the model's defaults for steps, guidance scale and eta."""
        defaults = model.defaults
        return replace(
            self,
            steps=defaults.num_inference_steps if self.steps is None else self.steps,
            guidance_scale=defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            eta=defaults.eta if self.eta is None else self.eta,
        )


@dataclass(frozen=True)
class Measure:
    """Timing of one part with one batch size on one combination.

    Attributes:
        part: A component, or "image" for a whole generation.
        batch: Images of the call.
        combination: Name of the combination.
        timing: Seconds of one call.
        peak_bytes: Peak of the process's resident memory.
        ratio: Speed relative to the first combination.
    """

    part: str
    batch: int
    combination: str
    timing: Timing
    peak_bytes: int
    ratio: float

    @property
    def images_per_second(self) -> float | None:
        """Images per second of a whole generation; None for a component."""
        return self.batch / self.timing.median if self.part == IMAGE else None

    def facts(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        facts = {name: value for name, value in asdict(self).items() if name != "timing"}
        return {**facts, "seconds": self.timing.facts(), "images_per_second": self.images_per_second}


@dataclass(frozen=True)
class Benchmark:
    """Result of ``benchmark``.

    Attributes:
        bundle: Name of the bundle's folder.
        settings: How it was timed.
        per_step: Components that run at every step.
        loaded: Combination -> facts that its process reported after loading.
        refused: Combination -> reason why it does not run.
        measures: All timings.
    """

    bundle: str
    settings: BenchSettings
    per_step: tuple[str, ...]
    loaded: dict[str, Facts]
    refused: dict[str, str]
    measures: tuple[Measure, ...]

    def facts(self) -> dict[str, Any]:
        """Return the description as JSON values."""
        return {
            "bundle": self.bundle,
            "machine": machine(),
            "tools": versions(),
            "settings": {**asdict(self.settings), "batches": list(self.settings.batches)},
            "combinations": self.loaded,
            "refused": self.refused,
            "measures": [measure.facts() for measure in self.measures],
        }

    def chart(self) -> str:
        """Return an SVG: images per second by batch size, and seconds of each part at the first batch size."""
        images = [measure for measure in self.measures if measure.part == IMAGE]
        series = [
            Series(name, tuple((m.batch, m.images_per_second or 0.0) for m in images if m.combination == name))
            for name in self.loaded
        ]
        steps = self.settings.steps or 1
        rows: dict[str, dict[str, float]] = {}
        for measure in self.measures:
            if measure.batch != self.settings.batches[0]:
                continue
            times = steps if measure.part in self.per_step else 1
            label = f"{measure.part} × {times}" if measure.part in self.per_step else measure.part
            rows.setdefault(label, {})[measure.combination] = measure.timing.median * times
        batch = f"{self.settings.batches[0]} image{'s' if self.settings.batches[0] > 1 else ''}"
        return sheet(
            [
                lines(f"{self.bundle}: {steps} steps", "images in a call", "images a second", series),
                bars(f"Where the time goes: {batch}", "seconds", rows),
            ]
        )
