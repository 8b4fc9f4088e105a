"""Times a bundle, component by component and end to end, on several backends and precisions that take turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ldm_export.bench.bundle_worker import IMAGE
from ldm_export.bench.component_feeds import component_rows
from ldm_export.bench.figures import Timing, machine, speedup, versions
from ldm_export.bench.worker_pool import Facts, Worker, rounds
from ldm_export.page.chart import Series, bars, lines, sheet
from ldm_runtime.backends.engine import pipeline_components
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, SpecError
from ldm_runtime.model import ModelDescription
from ldm_runtime.number_checks import FLOAT32_MAX, integer, number, threads

__all__ = ["BenchSettings", "Benchmark", "Combination", "Measure", "benchmark"]

MAX_COMBINATIONS, MAX_RUNS, MAX_BATCHES, MAX_IMAGES = 8, 1000, 16, 10**6
MAX_SIZE = 2**24
SEED = 0


@dataclass(frozen=True)
class Combination:
    """A backend and a precision; None is the bundle's own precision."""

    backend: str
    precision: str | None = None

    @property
    def name(self) -> str:
        """E.g. "openvino bf16"."""
        return f"{self.backend} {self.precision}" if self.precision else self.backend


@dataclass(frozen=True)
class BenchSettings:
    """How a bundle is timed. None takes the model's own value.

    Attributes:
        batches: Images of one call, each number in turn.
        steps: Denoising steps of a generation.
        runs: Rounds.
        guidance_scale: 1 turns guidance off.
        eta: Noise of each step.
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
    """Timing of one part at one batch size on one combination.

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
        """Return the JSON-able description."""
        facts = {name: value for name, value in asdict(self).items() if name != "timing"}
        return {**facts, "seconds": self.timing.facts(), "images_per_second": self.images_per_second}


@dataclass(frozen=True)
class Benchmark:
    """Result of ``benchmark``.

    Attributes:
        bundle: Name of the bundle's folder.
        settings: How it was timed.
        per_step: Components that run at every step.
        loaded: Combination -> what its process reported after loading.
        refused: Combination -> why it does not run.
        measures: All timings.
    """

    bundle: str
    settings: BenchSettings
    per_step: tuple[str, ...]
    loaded: dict[str, Facts]
    refused: dict[str, str]
    measures: tuple[Measure, ...]

    def facts(self) -> dict[str, Any]:
        """Return the JSON-able description."""
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


@dataclass(frozen=True)
class _Task:
    """One part at one batch size, and the command that its workers get."""

    part: str
    batch: int
    command: Facts


def benchmark(
    bundle: Path,
    combinations: Sequence[Combination],
    settings: BenchSettings,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Benchmark:
    """Load every combination in a process of its own, and time them in turns.

    Combinations that cannot run here are left out and reported in ``refused``.

    Args:
        bundle: Folder of the bundle.
        combinations: What is compared; ratios refer to the first one.
        settings: How the bundle is timed.
        on_progress: Called with what is done, the number of calls done, and the number of all calls.

    Raises:
        ManifestError: There is no bundle, or it is damaged.
        SpecError: There are no combinations or too many, or the pipeline does not take a setting.
        BackendError: No combination runs, or one fails later.
    """
    if not 1 <= len(set(combinations)) == len(combinations) <= MAX_COMBINATIONS:
        raise SpecError(f"combinations: got {len(combinations)}, expected 1..{MAX_COMBINATIONS}, each once")
    opened = Bundle.open(bundle)
    model, name = opened.manifest.model, opened.folder.resolve().name
    settings = settings.for_model(model)
    tasks = list(_tasks(model, settings))
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        workers = list[Worker]()
        for combination in combinations:
            on_progress(f"loading {combination.name}", 0, 1)
            try:
                workers.append(stack.enter_context(_worker(bundle, combination, settings)))
            except BackendError as error:
                refused[combination.name] = str(error).removeprefix(f"{combination.name}: ")
        if not workers:
            raise BackendError(f"bench: nothing runs: {'; '.join(f'{name}: {why}' for name, why in refused.items())}")
        total, done, measures = len(tasks) * len(workers) * (settings.runs + 1), 0, list[Measure]()
        for task in tasks:

            def step(task: _Task = task) -> None:
                nonlocal done
                done += 1
                on_progress(f"{task.part}, batch {task.batch}", done, total)

            answers = rounds(workers, lambda number, task=task: task.command, settings.runs, step)  # type: ignore[misc]
            measures += _measures(task, [worker.name for worker in workers], answers)
        loaded = {worker.name: worker.facts for worker in workers}
    per_step = tuple(part for part in pipeline_components(model) if model.components[part].runs == "step")
    return Benchmark(name, settings, per_step, loaded, refused, tuple(measures))


def _tasks(model: ModelDescription, settings: BenchSettings) -> Iterator[_Task]:
    """Yield every part at every batch size; parts whose work does not depend on the batch size only once."""
    branches = max(1, len(model.guidance)) if settings.guidance_scale != 1 else 1
    options = {
        "seed": SEED,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "eta": settings.eta,
    }
    size = {"height": settings.height, "width": settings.width}
    seen: set[tuple[str, int]] = set()
    for batch in settings.batches:
        for part in pipeline_components(model):
            rows = component_rows(model, part, batch, branches, settings.steps or 1)
            if (part, rows) not in seen:
                seen.add((part, rows))
                yield _Task(part, batch, {"part": part, "rows": rows, **size})
        yield _Task(IMAGE, batch, {"part": IMAGE, "batch": batch, "options": options, **size})


def _worker(bundle: Path, combination: Combination, settings: BenchSettings) -> Worker:
    options = {"bundle": str(bundle), "device": settings.device, "threads": settings.threads, **asdict(combination)}
    return Worker(combination.name, [sys.executable, "-m", "ldm_export.bench.bundle_worker"], options)


def _measures(task: _Task, names: Sequence[str], answers: Sequence[Sequence[Facts]]) -> list[Measure]:
    seconds = [[answer["seconds"] for answer in worker] for worker in answers]
    return [
        Measure(
            task.part,
            task.batch,
            name,
            Timing.of(seconds[index]),
            max(answer["peak_bytes"] for answer in answers[index]),
            speedup(seconds[index], seconds[0]),
        )
        for index, name in enumerate(names)
    ]
