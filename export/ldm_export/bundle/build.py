"""Builds a bundle from a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from ldm_calibration.settings import CalibrationSettings, Grade
from ldm_export.bundle.assemble import assemble
from ldm_export.bundle.build_plan import BuildPlan
from ldm_export.bundle.engine_stages import engine_of, engine_stage, in_latents
from ldm_export.bundle.feature_cache_layers import feature_cache_layers
from ldm_export.bundle.graph_stages import (
    file_stages,
    graph_stages,
    model_steps,
    split_model,
    step_stages,
)
from ldm_export.bundle.int8_stages import graph_files, int8_stages
from ldm_export.bundle.kept_loras import with_kept_loras
from ldm_export.bundle.precision_stages import calibration_model, half_stages, ranges_stage
from ldm_export.bundle.previous import describes, previous_bundle
from ldm_export.bundle.publish import work_folder
from ldm_export.bundle.shallow_stages import has_deep_features, shallow_stages, shallow_variants, with_shallow_unet
from ldm_export.bundle.stages import OnProgress, Outcome, Stage, run_stage
from ldm_export.bundle.variant_stages import CUDA_PRECISION, Variant, cpu_variants, cuda_variants
from ldm_export.checkpoint.digest import CHECKPOINT_SHA256, weights_sha256
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.engine.request import EngineRequest
from ldm_export.families import family_named
from ldm_export.families.description import described
from ldm_export.requests import RequestFields
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import BuildError
from ldm_runtime.manifest import Component, Manifest, StageFact
from ldm_runtime.specs import ComponentSpec

__all__ = ["PRECISIONS", "BuildOptions", "Built", "build"]

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
TOOLS = ("torch", "diffusers", "transformers", "tokenizers", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build: graphs and engines to produce in addition to the fp32 graphs.

    Attributes:
        precision: "fp32", "fp16", "bf16" or "int8".
        engines: Also build TensorRT engines of that precision; bounds of height and width are in pixels.
        calibration: Settings of int8's calibration; for int8 only.
        grade: Decides which calibration images are correct, if there is a bound on prompt accuracy.
        requests: Requests with which the ranges for half precision are measured. None takes the family's defaults.
        cuda: Also write graphs for ONNX Runtime on CUDA; for fp16 only.
        feature_cache: Layers of the UNet's last up block in the graphs for steps with cached features; 0 writes none,
            and "auto" takes what was measured on the bundle that is written again.

    Raises:
        BuildError: The precision is unknown, int8 has no settings, or an option is for another precision.
    """

    precision: str = "fp32"
    engines: EngineRequest | None = None
    calibration: CalibrationSettings | None = None
    grade: Grade | None = None
    requests: Sequence[RequestFields] | None = None
    cuda: bool = False
    feature_cache: int | Literal["auto"] = 1

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise BuildError(f"precision: got {self.precision!r:.40}, expected one of {', '.join(PRECISIONS)}")
        if (self.precision == "int8") != (self.calibration is not None):
            raise BuildError("int8 needs requests to calibrate with, and other precisions take none")
        if self.cuda and self.precision != CUDA_PRECISION:
            raise BuildError(
                f"graphs for ONNX Runtime on CUDA: got precision {self.precision}, expected {CUDA_PRECISION}; "
                f"add --precision {CUDA_PRECISION}"
            )

    @property
    def precisions(self) -> tuple[str, ...]:
        """fp32, and the precision if it differs."""
        return tuple(dict.fromkeys(("fp32", self.precision)))


@dataclass(frozen=True)
class Built:
    """A bundle, and the origin of each stage's files: "made", "resumed" or "kept"."""

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
    """Export a checkpoint's components into a bundle. Stages of an existing bundle that are still valid are kept.

    One component at a time is loaded, traced and freed. The bundle appears complete or not at all.

    Args:
        checkpoint: An opened checkpoint.
        target: The bundle's folder; an existing folder that is not a bundle is refused.
        precision, engines: Shorthand for ``options`` with only these values.
        options: Options; see ``BuildOptions``.
        on_progress: Called with the progress of each stage; the last stage is "bundle".

    Raises:
        CheckpointError: Weights are missing or damaged.
        BuildError: A component cannot be exported, or files cannot be written.
    """
    options = BuildOptions(precision, engines) if options is None else options
    target = target.resolve()  # replaces the folder that a link points to
    family = family_named(checkpoint.family)
    model, previous = described(family, checkpoint), previous_bundle(target)
    layers, measured = feature_cache_layers(options.feature_cache, previous, target)
    options = replace(options, feature_cache=layers)
    latents = None if options.engines is None else in_latents(options.engines, model, options.precision)
    tools = {"ldm-export": version("ldm-export"), **{name: version(name) for name in TOOLS}}
    request = _request(checkpoint, options, family.quantize)
    outcomes: dict[str, Outcome] = {}
    with work_folder(target) as work:
        plan = BuildPlan(checkpoint, family, model, work, previous, tools, on_progress, layers)
        _run([*file_stages(plan), *graph_stages(plan)], plan, outcomes)
        plan = replace(plan, model=split_model(plan, outcomes))
        precise = _precision_stages(plan, options, outcomes)
        _run(precise, plan, outcomes)
        sources = _sources(outcomes)
        variants = [*cpu_variants(plan, sources), *(cuda_variants(plan, sources, precise[0]) if options.cuda else ())]
        _run([*step_stages(plan), *(variant.stage for variant in variants)], plan, outcomes)
        if has_deep_features(plan.model):
            sources = _sources(outcomes)
            shallow = shallow_variants(work, sources, variants)
            stages = [*shallow_stages(work, sources, options.precisions), *(variant.stage for variant in shallow)]
            _run(stages, plan, outcomes)
            plan, variants = replace(plan, model=with_shallow_unet(plan.model, work)), [*variants, *shallow]
        if latents is not None:
            _run(_engine_stages(plan, latents, options.precision, _sources(outcomes)), plan, outcomes)
        on_progress("bundle", 0, 1)
        manifest = Manifest(
            family=plan.model.family,
            components=_components(plan, options, latents, variants, outcomes),
            conditioning=plan.model.conditioning,
            guidance=plan.model.guidance,
            guidance_above_one=plan.model.guidance_above_one,
            latents=plan.model.latents,
            scheduler=plan.model.scheduler,
            defaults=plan.model.defaults,
            files={name: fact for outcome in outcomes.values() for name, fact in outcome.files.items()},
            stages={name: StageFact(outcome.key, tuple(outcome.files)) for name, outcome in outcomes.items()},
            tools=tools,
            request=request,
            measured=measured,
        )
        untouched = all(outcome.origin == "kept" for outcome in outcomes.values())
        if untouched and previous is not None and describes(previous, manifest):
            shutil.rmtree(work)
        else:
            assemble(work, target, with_kept_loras(manifest, previous, work), outcomes)
    on_progress("bundle", 1, 1)
    return Built(Bundle.open(target), {name: outcome.origin for name, outcome in outcomes.items()})


def _run(stages: Sequence[Stage], plan: BuildPlan, outcomes: dict[str, Outcome]) -> None:
    """Run stages one after the other and record their outcomes."""
    for stage in stages:
        plan.on_progress(stage.name, 0, 1)
        outcomes[stage.name] = run_stage(stage, plan.work, plan.previous)
        plan.on_progress(stage.name, 1, 1)


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


def _components(
    plan: BuildPlan,
    options: BuildOptions,
    engines: EngineRequest | None,
    variants: Sequence[Variant],
    outcomes: Mapping[str, Outcome],
) -> dict[str, Component]:
    """Return the components of the model, then the step graphs, which are always in fp32."""

    def component(spec: ComponentSpec, precisions: tuple[str, ...]) -> Component:
        graphs = graph_files(spec.name, precisions, outcomes)
        built = () if engines is None else (engine_of(plan, spec.name, precisions[-1], engines),)
        return Component(spec, graphs, built)

    components = {name: component(spec, options.precisions) for name, spec in plan.model.components.items()}
    for variant in variants:
        if variant.file in outcomes[variant.stage.name].files:
            part = components[variant.component]
            graphs = {**part.variants, variant.engine: {variant.precision: variant.file}}
            components[variant.component] = replace(part, variants=graphs)
    return components | {name: component(spec, ("fp32",)) for name, spec in model_steps(plan.model).items()}


def _request(checkpoint: Checkpoint, options: BuildOptions, quantize: tuple[str, ...]) -> dict[str, Any]:
    """Return the manifest's entry about the build request; it does not depend on this machine."""
    request: dict[str, Any] = {
        "checkpoint": checkpoint.folder.resolve().name,
        "precision": options.precision,
        "quantize": list(quantize),
        "feature_cache": options.feature_cache,
    }
    if options.engines is not None:
        engines = asdict(options.engines)
        request["engines"] = {
            "target": engines["target"],
            "compute_capabilities": list(engines["compute_capabilities"]),
            "bounds": {name: list(bounds) for name, bounds in engines["bounds"]},
            "refittable": engines["refittable"],
            "version_compatible": engines["version_compatible"],
        }
    if options.cuda:
        request["cuda"] = True
    for name, files in (("loras", checkpoint.loras), ("embeddings", checkpoint.embeddings)):
        if files:
            request[name] = [dict(file) for file in files]
    if checkpoint.random_seed is not None:
        return {**request, "random_weights_seed": checkpoint.random_seed}
    return {**request, CHECKPOINT_SHA256: weights_sha256(checkpoint.folder)}
