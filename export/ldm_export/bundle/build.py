"""Builds a bundle from a checkpoint."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from ldm_export.bundle.build_manifest import build_request, built_manifest, same_build
from ldm_export.bundle.build_plan import BuildOptions, BuildPlan
from ldm_export.bundle.engine_stages import engine_stage, in_latents
from ldm_export.bundle.graph_stages import (
    file_stages,
    graph_stages,
    model_steps,
    split_model,
    step_stages,
    variant_stages,
)
from ldm_export.bundle.int8_stages import int8_stages
from ldm_export.bundle.precision_stages import calibration_model, half_stages, ranges_stage
from ldm_export.bundle.publish import publish, work_folder
from ldm_export.bundle.stages import OnProgress, Outcome, Stage, run_stage
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.engine.request import EngineRequest
from ldm_export.families import family_named
from ldm_runtime.atomic_files import write_whole
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import BUILD_LOG, MANIFEST
from ldm_runtime.errors import BuildError, ManifestError
from ldm_runtime.manifest import FORMAT, Manifest

__all__ = ["BuildOptions", "Built", "assemble", "build"]

TOOLS = ("torch", "diffusers", "transformers", "tokenizers", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True)
class Built:
    """A bundle, and the origin of the files of each stage: "made", "resumed" or "kept"."""

    bundle: Bundle
    origins: dict[str, str]


def build(
    checkpoint: Checkpoint,
    target: Path,
    precision: str = "fp32",
    engines: EngineRequest | None = None,
    *,
    options: BuildOptions | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Built:
    """Export a checkpoint's components and write a bundle; finished stages of an existing bundle are kept.

    One component at a time is loaded, traced and freed. The bundle appears whole or not at all.

    Args:
        checkpoint: An opened checkpoint.
        target: The bundle's folder; an existing folder that is not a bundle is refused.
        precision, engines: Shorthand for ``options`` with these values only.
        options: What to build besides the fp32 graphs.
        on_progress: Receives the progress of each stage, the last of which is "bundle".

    Raises:
        CheckpointError: Weights are missing or damaged.
        BuildError: A component cannot be exported, or files cannot be written.
    """
    options = BuildOptions(precision, engines) if options is None else options
    target = target.resolve()  # replaces the folder that a link points to
    family = family_named(checkpoint.family)
    model, previous = family.describe(checkpoint), _previous(target)
    latents = None if options.engines is None else in_latents(options.engines, model, options.precision)
    tools = {"ldm-export": version("ldm-export"), **{name: version(name) for name in TOOLS}}
    request = build_request(checkpoint, options, family.quantize)
    outcomes: dict[str, Outcome] = {}
    with work_folder(target) as work:
        plan = BuildPlan(checkpoint, family, model, work, previous, tools, on_progress)
        _run([*file_stages(plan), *graph_stages(plan)], plan, outcomes)
        plan = replace(plan, model=split_model(plan, outcomes))
        _run(_precision_stages(plan, options, outcomes), plan, outcomes)
        variants = variant_stages(plan, _sources(outcomes))
        _run([*step_stages(plan), *variants.values()], plan, outcomes)
        if latents is not None:
            _run(_engine_stages(plan, latents, options.precision, _sources(outcomes)), plan, outcomes)
        on_progress("bundle", 0, 1)
        manifest = built_manifest(plan, options, latents, variants, outcomes, request)
        untouched = all(outcome.origin == "kept" for outcome in outcomes.values())
        if untouched and previous is not None and same_build(previous, manifest):
            shutil.rmtree(work)
        else:
            assemble(work, target, manifest, outcomes)
    on_progress("bundle", 1, 1)
    return Built(Bundle.open(target), {name: outcome.origin for name, outcome in outcomes.items()})


def _run(stages: Sequence[Stage], plan: BuildPlan, outcomes: dict[str, Outcome]) -> None:
    """Run stages one after the other and note their outcomes."""
    for stage in stages:
        plan.on_progress(stage.name, 0, 1)
        outcomes[stage.name] = run_stage(stage, plan.work, plan.previous)
        plan.on_progress(stage.name, 1, 1)


def _previous(target: Path) -> Bundle | None:
    if not target.exists():
        return None
    if not target.is_dir() or (any(target.iterdir()) and not _has_manifest(target)):
        raise BuildError(f"{target}: exists and is no bundle; choose another -o or remove it, nothing was changed")
    try:
        return Bundle.open(target)
    except ManifestError:
        return None  # damaged, or of another version: build everything


def _has_manifest(folder: Path) -> bool:
    """True if the folder has a bundle's manifest, even a damaged one; other programs write a manifest.json too."""
    manifest = folder / MANIFEST
    return manifest.is_file() and json.dumps(FORMAT).encode() in manifest.read_bytes()


def _precision_stages(plan: BuildPlan, options: BuildOptions, outcomes: Mapping[str, Outcome]) -> list[Stage]:
    """The stages of int8 or of half precision; none for fp32."""
    before = {name: outcome.key for name, outcome in outcomes.items()}
    if options.calibration is not None:
        model, quantize = calibration_model(plan), plan.family.quantize
        return int8_stages(plan.work, model, options.calibration, quantize, before, plan.on_progress, options.grade)
    if options.precision == "fp32":
        return []
    requests = plan.family.requests(None) if options.requests is None else options.requests
    ranges = ranges_stage(plan, before, requests)
    return [ranges, *half_stages(plan, options.precision, ranges)]


def _engine_stages(plan: BuildPlan, request: EngineRequest, precision: str, sources: Mapping[str, str]) -> list[Stage]:
    components = [(spec, precision) for spec in plan.model.components.values()]
    steps = [(spec, "fp32") for spec in model_steps(plan.model).values()]
    return [engine_stage(plan, spec, graph, request, sources) for spec, graph in (*components, *steps)]


def _sources(outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """File -> key of the stage that wrote it."""
    return {file: outcome.key for outcome in outcomes.values() for file in outcome.files}


def assemble(work: Path, target: Path, manifest: Manifest, outcomes: Mapping[str, Outcome]) -> None:
    """Replace the bundle at ``target`` by the manifest's files, which are in ``work``, and remove ``work``."""
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    for name in manifest.files:
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).rename(finished / name)
    write_whole(finished / MANIFEST, manifest.to_json().encode())
    log = {
        "host": platform.platform(),
        "python": platform.python_version(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stages": {name: {"seconds": round(o.seconds, 3), "origin": o.origin} for name, o in outcomes.items()},
    }
    write_whole(finished / BUILD_LOG, (json.dumps(log, indent=2) + "\n").encode())
    publish(finished, target)
    shutil.rmtree(work)
