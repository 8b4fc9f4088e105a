"""From a bundle that is there to one with int8 graphs beside the fp32 ones; no checkpoint is needed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ldm_calibration.quality import Grader
from ldm_calibration.settings import Settings
from ldm_export.bundle.build import Built, assemble
from ldm_export.bundle.int8_report import REPORT
from ldm_export.bundle.int8_stages import graph_files, int8_stages
from ldm_export.bundle.stages import Outcome, link_files, run_stage, work_folder
from ldm_runtime.bundle import Bundle
from ldm_runtime.ddim import DDIM
from ldm_runtime.errors import BuildError
from ldm_runtime.manifest import COMPONENTS
from ldm_runtime.manifest import Stage as StageFact

SOURCES = ("tokenizer", *(f"{name}.fp32" for name in COMPONENTS))
"""The stages whose files a calibration starts from."""


def calibrate(
    folder: Path,
    settings: Settings | Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    grade: Grader | None = None,
) -> Built:
    """Add int8 graphs to a bundle, or keep those that these settings have given already.

    In place of settings a calibration record may be given: then nothing is measured. Other precisions' graphs, engines
    and reports stay. The bundle is exchanged at the end, whole. With ``grade``, which decides which trial images match
    their prompts, the record has the prompt accuracy, and ``settings.max_accuracy_loss`` bounds it.

    Raises:
        ManifestError: no bundle, or a file of it is not what was built.
        BuildError: the model gives NaN, or the budget cannot be met.
        SpecError: ``settings.max_accuracy_loss`` is set, but the images cannot be graded.
    """
    target = folder.resolve()
    bundle = Bundle.open(target)
    manifest = bundle.manifest
    missing = [name for name in SOURCES if name not in manifest.stages]
    if missing:
        raise BuildError(f"{folder}: was built without the stages {', '.join(missing)}; rebuild it to calibrate it")
    staying = {name: held for name, held in manifest.stages.items() if not _of_int8(name)}
    anew = {name for stage, held in manifest.stages.items() if _of_int8(stage) for name in held.files} | {REPORT}
    outcomes: dict[str, Outcome] = {}
    with work_folder(target) as work:
        progress("checking the bundle", 0, 1)
        files = link_files([name for name in manifest.files if name not in anew], work, bundle)
        for name, held in staying.items():
            outcomes[name] = Outcome(held.key, {file: files[file] for file in held.files}, "kept", 0.0)
        specs = {name: manifest.components[name].spec for name in COMPONENTS}
        before = {name: staying[name].key for name in SOURCES}
        scheduler = DDIM.from_config(manifest.scheduler)
        stages = int8_stages(work, specs, scheduler, settings, before, progress, grade)
        for done, stage in enumerate(stages):
            progress(stage.name, done, len(stages))
            outcomes[stage.name] = run_stage(stage, work, bundle)
            files |= outcomes[stage.name].files
        if all(outcome.origin == "kept" for outcome in outcomes.values()) and bundle.precision == "int8":
            shutil.rmtree(work)
        else:
            made = {name: graph_files(name, ("fp32", "int8"), outcomes) for name in COMPONENTS}
            components = {
                name: replace(part, graphs={**part.graphs, **made.get(name, {})})
                for name, part in manifest.components.items()
            }
            finished = replace(
                manifest,
                components=components,
                files=files,
                stages={name: StageFact(outcome.key, tuple(outcome.files)) for name, outcome in outcomes.items()},
                asked={**manifest.asked, "precision": "int8"},
                measured={name: facts for name, facts in manifest.measured.items() if name != "int8"},
            )
            assemble(work, target, finished, outcomes)
    return Built(Bundle.open(target), {name: outcome.origin for name, outcome in outcomes.items()})


def _of_int8(stage: str) -> bool:
    return stage == "calibration" or stage.endswith(".int8")
