"""Times a bundle, its components and whole generations, on several backends and precisions that take turns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm_export.bench.bench_results import Benchmark, BenchSettings, Combination, Measure
from ldm_export.bench.bundle_worker import IMAGE
from ldm_export.bench.component_feeds import component_rows
from ldm_export.bench.figures import Timing, speedup
from ldm_export.bench.worker_pool import Facts, Worker, rounds
from ldm_runtime.backends.engine import pipeline_components
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BackendError, SpecError
from ldm_runtime.model import ModelDescription

__all__ = ["benchmark"]

MAX_COMBINATIONS = 8
SEED = 0


@dataclass(frozen=True)
class _Task:
    """One part with one batch size, and the command for its workers."""

    part: str
    batch: int
    command: Facts


def benchmark(
    bundle: Path,
    combinations: Sequence[Combination],
    settings: BenchSettings,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Benchmark:
    """Load every combination in its own process, and time them in turns.

    Combinations that cannot run here are left out and reported in ``refused``.

    Args:
        bundle: Folder of the bundle.
        combinations: Backends and precisions to compare; ratios refer to the first.
        settings: How the bundle is timed.
        on_progress: Called with a description, the number of finished calls, and the number of all calls.

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
    unique: set[tuple[str, int]] = set()
    for batch in settings.batches:
        for part in pipeline_components(model):
            rows = component_rows(model, part, batch, branches, settings.steps or 1)
            if (part, rows) not in unique:
                unique.add((part, rows))
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
