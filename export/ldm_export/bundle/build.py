"""From a checkpoint to a bundle."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_calibration.settings import Settings
from ldm_export.bundle.build_stages import (
    TOKENIZER,
    engine_file,
    engine_stage,
    graph_stage,
    half_stage,
    keyed_stage,
    ranges_stage,
    step_stage,
    tokenizer_stage,
)
from ldm_export.bundle.int8_stages import graph_files, int8_stages
from ldm_export.bundle.publish import publish
from ldm_export.bundle.stages import Outcome, Stage, run_stage, work_folder
from ldm_export.checkpoint.digest import CHECKPOINT_SHA256, weights_sha256
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.engine.request import EngineRequest
from ldm_export.graph.components import model_shape
from ldm_export.graph.keyed_unet import FILES, keyed_specs
from ldm_export.graph.step_graph import step_specs
from ldm_export.prompts import NEUTRAL, PromptSet
from ldm_runtime.backends.onnxruntime_keyed import KEYS
from ldm_runtime.bundle import NAME, Bundle, write_whole
from ldm_runtime.ddim import DDIM
from ldm_runtime.engine_facts import Engine, engine_from_json
from ldm_runtime.errors import BuildError, ManifestError
from ldm_runtime.manifest import FORMAT, Component, Manifest
from ldm_runtime.manifest import Stage as StageFact
from ldm_runtime.specs import ComponentSpec

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
TOOLS = ("torch", "diffusers", "transformers", "tokenizers", "onnx", "onnxscript", "onnx-ir")
LOG = "build-log.json"


@dataclass(frozen=True)
class Built:
    """A bundle and, per stage, where its files came from: "made", "resumed" or "kept"."""

    bundle: Bundle
    origins: dict[str, str]


def build(
    checkpoint: Checkpoint,
    target: Path,
    precision: str = "fp32",
    engines: EngineRequest | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    settings: Settings | None = None,
    prompts: PromptSet = NEUTRAL,
) -> Built:
    """Export a checkpoint's text encoder, UNet and decoder and write a bundle; what is there already is kept.

    One component at a time is loaded, traced and freed. The bundle appears whole or not at all.

    Args:
        checkpoint: an opened checkpoint.
        target: the bundle's folder; one that is no bundle is refused.
        precision: "fp32", "fp16", "bf16" or "int8"; the fp32 graphs, which the others are made of, stay beside them.
        engines: also build TensorRT engines of that precision.
        progress: told stage name, stages done and stages in all, before each stage and at the end; within a long stage
            the stage's name, and of its own steps those done and all.
        settings: of int8's calibration.
        prompts: what half precision's tensor ranges are measured with, and the grader for int8's budget.

    Raises:
        CheckpointError: weights are missing or damaged.
        BuildError: a component cannot be exported, or the disk refuses.
    """
    if precision not in PRECISIONS:
        raise BuildError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if (precision == "int8") != (settings is not None):
        raise BuildError("settings: int8 needs them, for its calibration, and other precisions take none")
    target = target.resolve()  # a link stays a link
    previous = _previous(target)
    specs = model_shape(checkpoint).specs()
    scheduler = DDIM.from_config(checkpoint.scheduler_config)
    tools = {"ldm-export": version("ldm-export"), **{name: version(name) for name in TOOLS}}
    precisions = tuple(dict.fromkeys(("fp32", precision)))
    outcomes: dict[str, Outcome] = {}
    with work_folder(target) as work:
        steps = step_specs(specs["unet"])
        stages = _stages(
            checkpoint, specs, steps, scheduler, precisions, engines, settings, prompts, work, tools, progress, previous
        )
        for done, stage in enumerate(stages):
            progress(stage.name, done, len(stages))
            outcomes[stage.name] = run_stage(stage, work, previous)
        progress("bundle", len(stages), len(stages))
        components = {
            name: Component(
                spec,
                graph_files(name, precisions if name in specs else ("fp32",), outcomes),
                _engines(work, name, precision if name in specs else "fp32", engines),
            )
            for name, spec in {**specs, **steps}.items()
        }
        manifest = Manifest(
            components=components | _keyed(work, specs["unet"]),
            scheduler=scheduler.to_config(),
            tokenizer=TOKENIZER,
            files={name: fact for outcome in outcomes.values() for name, fact in outcome.files.items()},
            stages={name: StageFact(outcome.key, tuple(outcome.files)) for name, outcome in outcomes.items()},
            tools=tools,
            asked=_asked(checkpoint, precision, engines),
        )
        untouched = all(outcome.origin == "kept" for outcome in outcomes.values())
        if untouched and previous is not None and _same(previous, manifest):
            shutil.rmtree(work)
        else:
            assemble(work, target, manifest, outcomes)
    return Built(Bundle.open(target), {name: outcome.origin for name, outcome in outcomes.items()})


def _previous(target: Path) -> Bundle | None:
    if not target.exists():
        return None
    if not target.is_dir() or (any(target.iterdir()) and not _has_manifest(target)):
        raise BuildError(f"{target}: exists and is no bundle; choose another -o or remove it, nothing was changed")
    try:
        return Bundle.open(target)
    except ManifestError:
        return None  # damaged, or of another version: build all of it


def _has_manifest(folder: Path) -> bool:
    """True for a bundle's manifest, whole or damaged: other programs have a manifest.json too."""
    manifest = folder / NAME
    return manifest.is_file() and json.dumps(FORMAT).encode() in manifest.read_bytes()


def _stages(
    checkpoint: Checkpoint,
    specs: dict[str, ComponentSpec],
    steps: dict[str, ComponentSpec],
    scheduler: DDIM,
    precisions: tuple[str, ...],
    engines: EngineRequest | None,
    settings: Settings | None,
    prompts: PromptSet,
    work: Path,
    tools: dict[str, str],
    progress: Callable[[str, int, int], None],
    previous: Bundle | None,
) -> list[Stage]:
    def told(stage: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(stage, done, total)

    stages = [tokenizer_stage(checkpoint, tools)]
    stages += [graph_stage(checkpoint, name, spec, tools) for name, spec in specs.items()]
    step_stages = [step_stage(spec, tools) for spec in steps.values()]
    step_stages.append(keyed_stage(work, next(stage for stage in stages if stage.name == "unet.fp32")))
    if settings is not None:
        before = {stage.name: stage.key for stage in stages}
        stages += int8_stages(work, specs, scheduler, settings, before, progress, prompts.grade)
    elif halves := precisions[1:]:
        ranges = ranges_stage(work, specs, scheduler, stages, tools, told("ranges"), prompts.prompts)
        stages += [ranges, *(half_stage(work, name, half, ranges) for half in halves for name in specs)]
    if engines is not None:
        made = {stage.name: stage for stage in (*stages, *step_stages)}
        pixels, latents = specs["decoder"].outputs[0].bounds("opt"), specs["decoder"].inputs[0].bounds("opt")
        wanted = [(spec, precisions[-1], True) for spec in specs.values()]
        wanted += [(spec, "fp32", False) for spec in steps.values()]
        step_stages += [
            engine_stage(
                work,
                spec,
                precision,
                engines,
                made[f"{spec.name}.{precision}"],
                pixels[2] // latents[2],
                told(f"{spec.name}.{precision}.{engines.name}"),
                matrix=matrix,
                previous=previous,
            )
            for spec, precision, matrix in wanted
        ]
    return stages + step_stages


def _keyed(work: Path, unet: ComponentSpec) -> dict[str, Component]:
    specs = keyed_specs(unet, work / FILES[KEYS]) if (work / FILES[KEYS]).exists() else {}
    return {name: Component(spec, {"fp32": FILES[name]}) for name, spec in specs.items()}


def _engines(work: Path, component: str, precision: str, request: EngineRequest | None) -> tuple[Engine, ...]:
    if request is None:
        return ()
    facts = work / f"{engine_file(component, precision, request)}.json"
    return (engine_from_json(facts.name, json.loads(facts.read_text())),)


def _asked(checkpoint: Checkpoint, precision: str, engines: EngineRequest | None) -> dict[str, Any]:
    asked: dict[str, Any] = {"checkpoint": checkpoint.folder.resolve().name, "precision": precision}
    if engines is not None:
        asked["engines"] = {
            "target": engines.target,
            "compute_capabilities": list(engines.compute_capabilities),
            "bounds": {name: list(bounds) for name, bounds in engines.bounds},
            "refittable": engines.refittable,
        }
    if checkpoint.random_seed is None:
        return {**asked, CHECKPOINT_SHA256: weights_sha256(checkpoint.folder)}
    return {**asked, "random_weights_seed": checkpoint.random_seed}


def _same(previous: Bundle, manifest: Manifest) -> bool:
    """True where the previous bundle says what this build would, with reports and measurements added at most."""
    before = previous.manifest
    try:
        for name in before.files.keys() - manifest.files.keys():
            previous.file(name)
    except ManifestError:
        return False  # a damaged report: leave the reports out
    return (before.stages, before.scheduler, before.components, before.asked) == (
        manifest.stages,
        manifest.scheduler,
        manifest.components,
        manifest.asked,
    )


def assemble(work: Path, target: Path, manifest: Manifest, outcomes: Mapping[str, Outcome]) -> None:
    """Put the manifest's files, which lie in ``work``, in the bundle's place at once, and remove ``work``."""
    finished = work / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    for name in manifest.files:
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).rename(finished / name)
    write_whole(finished / NAME, manifest.to_json().encode())
    log = {
        "host": platform.platform(),
        "python": platform.python_version(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stages": {name: {"seconds": round(o.seconds, 3), "origin": o.origin} for name, o in outcomes.items()},
    }
    write_whole(finished / LOG, (json.dumps(log, indent=2) + "\n").encode())
    publish(finished, target)
    shutil.rmtree(work)
