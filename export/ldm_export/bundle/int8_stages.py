"""The stages of int8: the calibration record, in parts that a killed build need not make again, and the graphs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_calibration.choices import Choices
from ldm_calibration.layer_selection import require_grader, select_layers
from ldm_calibration.observation import observe
from ldm_calibration.qdq import insert_qdq
from ldm_calibration.quality import Grader
from ldm_calibration.record import graph_digest, read_record
from ldm_calibration.sampling import feeds_of
from ldm_calibration.scaling_search import choose
from ldm_calibration.sensitivity import unet_sensitivity
from ldm_calibration.sessions import load_graph
from ldm_calibration.settings import Settings
from ldm_calibration.trajectories import Model, Trajectories, run_trajectories
from ldm_calibration.weights import read_when_used
from ldm_export.bundle.stages import Outcome, Stage, run_stage
from ldm_export.graph.onnx_graph import save_graph
from ldm_runtime.ddim import DDIM
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import ComponentSpec

RECORD = "calibration.json"
TOOLS = ("ldm-export", "onnx", "onnx-ir", "onnxruntime")
METHOD = 3
"""Raised when the same settings come to give another record."""
TRIED = 4
"""Of the samples that are observed, every so-manieth is one that observers and migration are tried on."""
PART = 16
"""Layers whose sensitivity is measured in one part."""
Progress = Callable[[str, int, int], None]


def int8_stages(
    work: Path,
    specs: Mapping[str, ComponentSpec],
    scheduler: DDIM,
    settings: Settings | Path,
    before: Mapping[str, str],
    told: Progress,
    grade: Grader | None = None,
) -> list[Stage]:
    """The record and a graph for each component, made of the fp32 graphs and ``tokenizer.json`` in ``work``.

    In place of settings a record may be given: then nothing is measured.
    """
    graphs = {name: work / f"{name}/fp32.onnx" for name in specs}
    model = Model(graphs, specs, work / "tokenizer.json", scheduler)
    given = isinstance(settings, Path)
    record = given_stage(settings) if given else record_stage(work, model, settings, before, told, grade)
    return [record, *(int8_stage(work, name, f"{name}/fp32.onnx", record) for name in specs)]


def graph_files(component: str, precisions: Sequence[str], outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """Precision → the graph that serves it: that of fp32 where a component stays in fp32 as a whole."""
    files = {given: f"{component}/{given}.onnx" for given in precisions}
    made = {file for outcome in outcomes.values() for file in outcome.files}
    return {given: file if file in made else files["fp32"] for given, file in files.items()}


def record_stage(
    work: Path,
    model: Model,
    settings: Settings,
    before: Mapping[str, str],
    told: Progress,
    grade: Grader | None = None,
) -> Stage:
    """Calibrates the fp32 graphs that lie in ``work`` and writes the record.

    Args:
        work: the build's work folder; finished parts are kept in it until the build ends.
        model: of these graphs.
        settings: what is asked for.
        before: stage name → key of the stages that made the graphs and the tokenizer.
        told: part's name, done and total, while it runs.
        grade: decides which trial images match their prompts; ``settings.max_accuracy_loss`` needs it.

    Raises:
        SpecError: ``settings.max_accuracy_loss`` is set, but there is no grader.
    """
    require_grader(settings, grade)
    depends = {
        "stages": dict(before),
        "scheduler": model.scheduler.to_config(),
        "settings": repr(settings.observed),
        "method": METHOD,
        "tools": {name: version(name) for name in TOOLS},
    }

    def run(folder: Path) -> list[str]:
        held = Trajectories.load(_trajectories(work, model, settings, depends, told))
        choices = {name: _choices(work, model, settings, held, name, depends, told) for name in model.graphs}
        latent_db = _sensitivities(work, model, settings, choices["unet"], depends, told)
        record = select_layers(
            model, settings, choices, latent_db, held, lambda *done: told("calibration.budget", *done), grade
        )
        (folder / RECORD).write_text(record.to_json())
        return [RECORD]

    return Stage("calibration", {**depends, "settings": repr(settings), "graded": grade is not None}, run)


def given_stage(file: Path) -> Stage:
    """Takes over a record that was made before.

    Raises:
        ManifestError: it is none.
    """
    content = read_record(file).to_json()

    def run(folder: Path) -> list[str]:
        (folder / RECORD).write_text(content)
        return [RECORD]

    return Stage("calibration", {"record": hashlib.sha256(content.encode()).hexdigest()}, run)


def int8_stage(work: Path, name: str, fp32: str, record: Stage) -> Stage:
    """Writes a component's int8 graph as the record in ``work`` has it; nothing where the component stays in fp32.

    Its float layers are told in ``report/NAME.int8.json``. Its run raises BuildError where the record is of another
    graph.
    """

    def run(folder: Path) -> list[str]:
        held = read_record(work / RECORD).components[name]
        source, report = work / fp32, folder / f"report/{name}.int8.json"
        if held.graph != graph_digest(source):
            raise BuildError(f"{name}: {RECORD} was made for another fp32 graph; calibrate this bundle anew")
        if not held.chosen:
            return []
        (folder / name).mkdir()
        model = load_graph(source)
        done = insert_qdq(model, held.sources, held.results, held.chosen)
        read_when_used(model)
        files = save_graph(model, folder / name / "int8.onnx")
        left = {layer["name"]: layer["why"] for layer in held.layers if not layer["int8"]}
        report.parent.mkdir()
        facts = {"int8": len(done), "islands": left, "matrix_islands": list(left)}
        report.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        return [str(file.relative_to(folder)) for file in (*files, report)]

    return Stage(f"{name}.int8", {"record": record.key}, run)


def _trajectories(work: Path, model: Model, settings: Settings, depends: Mapping[str, Any], told: Progress) -> Path:
    file = "parts/trajectories.npz"

    def run(folder: Path) -> list[str]:
        (folder / file).parent.mkdir()
        run_trajectories(
            model,
            settings.prompts,
            settings.steps,
            settings.eta,
            settings.guidance_scale,
            lambda *done: told("calibration.trajectories", *done),
        ).save(folder / file)
        return [file]

    run_stage(Stage("calibration.trajectories", depends, run), work, None)
    return work / file


def _choices(
    work: Path,
    model: Model,
    settings: Settings,
    held: Trajectories,
    component: str,
    depends: Mapping[str, Any],
    told: Progress,
) -> Choices:
    name = f"calibration.{component}"

    def run(folder: Path) -> list[str]:
        feeds = feeds_of(held, component, settings.samples)
        graph = model.graphs[component]
        seen = observe(graph, feeds, lambda done, total: told(f"{name}.ranges", done, total))
        found = choose(graph, seen, feeds[::TRIED], lambda done, total: told(f"{name}.observers", done, total))
        return _written(folder, f"parts/{component}.json", found.facts())

    run_stage(Stage(name, depends, run), work, None)
    return Choices.from_facts(json.loads((work / f"parts/{component}.json").read_text()))


def _sensitivities(
    work: Path, model: Model, settings: Settings, choices: Choices, depends: Mapping[str, Any], told: Progress
) -> dict[str, float]:
    """Layer → dB of the final latents; empty where layers are ranked by their results."""
    found: dict[str, float] = {}
    if settings.sensitivity == "results":
        return found
    layers = list(choices.output_db)
    for start in range(0, len(layers), PART):
        name, file = f"calibration.sensitivity.{start}", f"parts/sensitivity.{start}.json"

        def run(folder: Path, start: int = start, file: str = file) -> list[str]:
            measured = unet_sensitivity(
                model,
                settings,
                choices.scalings,
                choices.results,
                layers[start : start + PART],
                lambda done, total: told("calibration.sensitivity", start + done, len(layers)),
            )
            return _written(folder, file, measured)

        run_stage(Stage(name, depends, run), work, None)
        found |= json.loads((work / file).read_text())
    return found


def _written(folder: Path, file: str, facts: Any) -> list[str]:
    (folder / file).parent.mkdir()
    (folder / file).write_text(json.dumps(facts))
    return [file]
