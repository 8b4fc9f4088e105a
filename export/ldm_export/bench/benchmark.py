"""Times a bundle, part by part and end to end, on several backends and precisions that take turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ldm_export.bench.figures import Timing, machine, speedup, versions
from ldm_export.bench.worker_pool import Facts, Worker, rounds
from ldm_export.page.chart import Series, bars, lines, sheet
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, SpecError

MAX_COMBINATIONS, MAX_RUNS, MAX_BATCHES = 8, 1000, 16
SEED = 0
PARTS = ("text_encoder", "conditioning", "unet", "decoder", "image")
"""What is timed: one text; what the UNet computes once a prompt; a step, and the decoding, of the batch; and pictures
from prompt to pixels."""


@dataclass(frozen=True)
class Combination:
    """A backend and a precision, None for the bundle's own, and where it runs."""

    backend: str
    precision: str | None = None

    @property
    def name(self) -> str:
        """E.g. "openvino bf16"."""
        return f"{self.backend} {self.precision}" if self.precision else self.backend


@dataclass(frozen=True)
class Settings:
    """How a bundle is timed: images a call, denoising steps, rounds, pixels, and the runtime's other options."""

    batches: tuple[int, ...] = (1, 2, 4)
    steps: int = 50
    runs: int = 5
    guidance: float = 6.0
    eta: float = 0.3
    height: int | None = None
    width: int | None = None
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value, most in (("runs", self.runs, MAX_RUNS), *(("batch", batch, 10**6) for batch in self.batches)):
            if not 1 <= value <= most:
                raise SpecError(f"{name}: got {value}, expected 1..{most}")
        if not 1 <= len(self.batches) <= MAX_BATCHES:
            raise SpecError(f"batch: got {len(self.batches)} of them, expected 1..{MAX_BATCHES}")


@dataclass(frozen=True)
class Measure:
    """One part at one batch on one combination; ``ratio`` is how many times as fast as the first combination it is."""

    part: str
    batch: int
    combination: str
    timing: Timing
    peak_bytes: int
    ratio: float

    @property
    def images_per_second(self) -> float | None:
        """Of whole pictures; None for a part."""
        return self.batch / self.timing.median if self.part == "image" else None

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        facts = {name: value for name, value in asdict(self).items() if name != "timing"}
        return {**facts, "seconds": self.timing.facts(), "images_per_second": self.images_per_second}


@dataclass(frozen=True)
class Benchmark:
    """All that was measured. ``loaded``: combination → what it told once loaded; ``refused``: → why it does not run."""

    bundle: str
    settings: Settings
    loaded: dict[str, Facts]
    refused: dict[str, str]
    measures: tuple[Measure, ...]

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
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
        """SVG: images a second by batch, and the seconds of each part at the first batch."""
        images = [measure for measure in self.measures if measure.part == "image"]
        series = [
            Series(name, tuple((m.batch, m.images_per_second or 0.0) for m in images if m.combination == name))
            for name in self.loaded
        ]
        steps = self.settings.steps
        first = [measure for measure in self.measures if measure.batch == self.settings.batches[0]]
        rows: dict[str, dict[str, float]] = {}
        for measure in first:
            label = f"{measure.part} × {steps}" if measure.part == "unet" else measure.part
            seconds = measure.timing.median * (steps if measure.part == "unet" else 1)
            rows.setdefault(label, {})[measure.combination] = seconds
        batch = f"{self.settings.batches[0]} image{'s' if self.settings.batches[0] > 1 else ''}"
        return sheet(
            [
                lines(f"{self.bundle}: {steps} steps", "images in a call", "images a second", series),
                bars(f"Where the time goes: {batch}", "seconds", rows),
            ]
        )


def benchmark(
    bundle: Path,
    combinations: Sequence[Combination],
    settings: Settings,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Benchmark:
    """Load every combination in a process of its own, and time them in turns.

    Those that cannot run here are left out and told.

    Raises:
        ManifestError: no bundle.
        SpecError: no combination, too many, or a setting the pipeline does not take.
        BackendError: none of the combinations runs, or one fails later on.
    """
    if not 1 <= len(set(combinations)) == len(combinations) <= MAX_COMBINATIONS:
        raise SpecError(f"combinations: got {len(combinations)}, expected 1..{MAX_COMBINATIONS}, each once")
    name = Bundle.open(bundle).folder.resolve().name
    tasks = [
        (part, batch)
        for batch in settings.batches
        for part in PARTS
        if part != PARTS[0] or batch == settings.batches[0]
    ]
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        workers = list[Worker]()
        for combination in combinations:
            progress(f"loading {combination.name}", 0, 1)
            try:
                workers.append(stack.enter_context(_worker(bundle, combination, settings)))
            except BackendError as error:
                refused[combination.name] = str(error).removeprefix(f"{combination.name}: ")
        if not workers:
            raise BackendError(f"bench: nothing runs: {'; '.join(f'{name}: {why}' for name, why in refused.items())}")
        total, done, measures = len(tasks) * len(workers) * (settings.runs + 1), 0, list[Measure]()
        for part, batch in tasks:

            def step(part: str = part, batch: int = batch) -> None:
                nonlocal done
                done += 1
                progress(f"{part}, batch {batch}", done, total)

            command: Facts = {
                "what": part,
                "batch": batch,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "eta": settings.eta,
                "seed": SEED,
                "height": settings.height,
                "width": settings.width,
            }
            answers = rounds(workers, partial(_same, command), settings.runs, step)
            measures += _measures(part, batch, [worker.name for worker in workers], answers)
        loaded = {worker.name: worker.facts for worker in workers}
    return Benchmark(name, settings, loaded, refused, tuple(measures))


def _same(command: Facts, number: int) -> Facts:
    """The command of every round: the same."""
    return command


def _worker(bundle: Path, combination: Combination, settings: Settings) -> Worker:
    told = {
        "bundle": str(bundle),
        **asdict(combination),
        **{name: getattr(settings, name) for name in ("device", "threads")},
    }
    return Worker(combination.name, [sys.executable, "-m", "ldm_export.bench.bundle_worker"], told)


def _measures(part: str, batch: int, names: Sequence[str], answers: Sequence[Sequence[Facts]]) -> list[Measure]:
    seconds = [[answer["seconds"] for answer in worker] for worker in answers]
    return [
        Measure(
            part,
            batch,
            name,
            Timing.of(seconds[index]),
            max(answer["peak_bytes"] for answer in answers[index]),
            speedup(seconds[index], seconds[0]),
        )
        for index, name in enumerate(names)
    ]
