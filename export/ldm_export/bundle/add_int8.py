"""Adds int8 graphs to an existing bundle; no checkpoint is needed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from ldm_calibration.calibration import OnProgress
from ldm_calibration.model import CalibrationModel
from ldm_calibration.settings import CalibrationSettings, Grade
from ldm_export.bundle.assemble import assemble
from ldm_export.bundle.build import Built
from ldm_export.bundle.int8_stages import PRECISION, REFERENCE, graph_files, int8_stages, is_int8_stage
from ldm_export.bundle.publish import work_folder
from ldm_export.bundle.shallow_stages import shallow_stages
from ldm_export.bundle.stages import Outcome, Stage, link_files, run_stage
from ldm_runtime.backends.engine import pipeline_components
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import INT8_REPORT, QUALITY_REPORT
from ldm_runtime.errors import BuildError
from ldm_runtime.manifest import Manifest, StageFact
from ldm_runtime.model import SHALLOW_UNET

__all__ = ["calibrate", "quantized_components"]


def calibrate(
    folder: Path,
    settings: CalibrationSettings | Path,
    on_progress: OnProgress = lambda part, done, total: None,
    grade: Grade | None = None,
) -> Built:
    """Add int8 graphs to a bundle, or keep those of an earlier calibration with equal settings.

    Graphs, engines and reports of other precisions are kept. At the end the bundle is replaced atomically.

    Args:
        folder: The bundle.
        settings: Settings of the calibration, or an existing calibration record to apply without measuring.
        on_progress: Called with the name of a part, its finished steps, and the number of its steps.
        grade: Decides which trial images are correct.

    Raises:
        ManifestError: The folder is not a bundle, or one of its files is damaged.
        SpecError: A bound on prompt accuracy is given without a grader.
        BuildError: The model computes NaN, or the budget cannot be kept.
    """
    target = folder.resolve()
    bundle = Bundle.open(target)
    manifest = bundle.manifest
    quantize, before = quantized_components(manifest), _sources(folder, manifest)
    staying = {name: stage for name, stage in manifest.stages.items() if not is_int8_stage(name)}
    outdated = {file for name, stage in manifest.stages.items() if name not in staying for file in stage.files}
    outcomes: dict[str, Outcome] = {}
    with work_folder(target) as work:
        on_progress("checking the bundle", 0, 1)
        outdated |= {INT8_REPORT, QUALITY_REPORT}  # measured with graphs that are replaced now
        files = link_files([name for name in manifest.files if name not in outdated], work, bundle)
        for name, fact in staying.items():
            outcomes[name] = Outcome(fact.key, {file: files[file] for file in fact.files}, "kept", 0.0)
        graphs = {name: work / graph for name, graph in _fp32_graphs(folder, manifest).items()}
        model = CalibrationModel(manifest.model, graphs, lambda name: work / name)

        def finish(stages: list[Stage]) -> None:
            for stage in stages:
                on_progress(stage.name, 0, 1)
                outcomes[stage.name] = run_stage(stage, work, bundle)
                on_progress(stage.name, 1, 1)
                files.update(outcomes[stage.name].files)

        finish(int8_stages(work, model, settings, quantize, before, on_progress, grade))
        if SHALLOW_UNET in manifest.components:
            written = {file: outcome.key for outcome in outcomes.values() for file in outcome.files}
            finish(shallow_stages(work, written, (PRECISION,)))
        if all(outcome.origin == "kept" for outcome in outcomes.values()) and bundle.precision == PRECISION:
            shutil.rmtree(work)
        else:
            finished = replace(_with_int8(manifest, quantize, outcomes), files=files)
            assemble(work, target, finished, outcomes)
    return Built(Bundle.open(target), {name: outcome.origin for name, outcome in outcomes.items()})


def quantized_components(manifest: Manifest) -> tuple[str, ...]:
    """Return the components of a bundle to quantize to int8, in this order, the denoiser first.

    Raises:
        BuildError: The manifest does not name them, or names one that the bundle does not have.
    """
    names = manifest.request.get("quantize")
    known = isinstance(names, list) and all(isinstance(name, str) and name in manifest.components for name in names)
    if not isinstance(names, list) or not names or not known:
        raise BuildError(
            f"quantize: got {names!r:.80} in the manifest's request, expected some of "
            f"{', '.join(manifest.components)}; rebuild the bundle to calibrate it"
        )
    return tuple(names)


def _fp32_graphs(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return component -> path of its fp32 graph, for all components that the pipeline runs but the shallow UNet."""
    names = [name for name in pipeline_components(manifest.model) if name != SHALLOW_UNET]
    if missing := [name for name in names if REFERENCE not in manifest.components[name].graphs]:
        raise BuildError(f"{folder}: has no {REFERENCE} graph of {', '.join(missing)}; rebuild it to calibrate it")
    return {name: manifest.components[name].graphs[REFERENCE] for name in names}


def _sources(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return stage -> key of the stages that wrote the fp32 graphs and the files of the conditioning."""
    needed = set(_fp32_graphs(folder, manifest).values())
    needed |= {file for entry in manifest.conditioning for file in entry.files.values()}
    owners = {file: name for name, stage in manifest.stages.items() for file in stage.files}
    if unowned := sorted(needed - owners.keys()):
        raise BuildError(f"{folder}: no stage of the build wrote {unowned[0]}; rebuild the bundle to calibrate it")
    return {name: manifest.stages[name].key for name in sorted({owners[file] for file in needed})}


def _with_int8(manifest: Manifest, quantize: tuple[str, ...], outcomes: dict[str, Outcome]) -> Manifest:
    """Return the manifest with int8 graphs. A component that stays in fp32 has its fp32 graph for both precisions."""
    components = {}
    for name in pipeline_components(manifest.model):
        part = manifest.components[name]
        own = name in (*quantize, SHALLOW_UNET)
        graphs = graph_files(name, (PRECISION,), outcomes) if own else {PRECISION: part.graphs[REFERENCE]}
        components[name] = replace(part, graphs={**part.graphs, **graphs})
    return replace(
        manifest,
        components={**manifest.components, **components},
        stages={name: StageFact(outcome.key, tuple(outcome.files)) for name, outcome in outcomes.items()},
        request={**manifest.request, "precision": PRECISION},
        measured={name: facts for name, facts in manifest.measured.items() if name != PRECISION},
    )
