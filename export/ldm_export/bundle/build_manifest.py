"""The manifest of a finished build: its components, its request, and the comparison with an earlier build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from ldm_export.bundle.build_plan import BuildOptions, BuildPlan
from ldm_export.bundle.engine_stages import engine_of
from ldm_export.bundle.graph_stages import model_steps
from ldm_export.bundle.int8_stages import graph_files
from ldm_export.bundle.stages import Outcome, Stage
from ldm_export.checkpoint.digest import CHECKPOINT_SHA256, weights_sha256
from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.engine.request import EngineRequest
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import graph_file
from ldm_runtime.errors import ManifestError
from ldm_runtime.manifest import Component, Manifest
from ldm_runtime.manifest import Stage as StageFact
from ldm_runtime.model import UNET
from ldm_runtime.specs import ComponentSpec

__all__ = ["build_request", "built_manifest", "same_build"]


def built_manifest(
    plan: BuildPlan,
    options: BuildOptions,
    engines: EngineRequest | None,
    variants: Mapping[str, Stage],
    outcomes: Mapping[str, Outcome],
    request: Mapping[str, Any],
) -> Manifest:
    """Return the manifest of a build whose stages have all run.

    Args:
        plan: Plan of the build, with the model of the bundle.
        options: Options of the build.
        engines: Request for engines, with bounds in latents.
        variants: Engine -> stage that wrote the UNet's graph for it.
        outcomes: Stage -> its outcome.
        request: Entry about the build request; see ``build_request``.
    """
    return Manifest(
        family=plan.model.family,
        components=_components(plan, options, engines, variants, outcomes),
        conditioning=plan.model.conditioning,
        guidance=plan.model.guidance,
        latents=plan.model.latents,
        scheduler=plan.model.scheduler,
        defaults=plan.model.defaults,
        files={name: fact for outcome in outcomes.values() for name, fact in outcome.files.items()},
        stages={name: StageFact(outcome.key, tuple(outcome.files)) for name, outcome in outcomes.items()},
        tools=plan.tools,
        request=request,
    )


def _components(
    plan: BuildPlan,
    options: BuildOptions,
    engines: EngineRequest | None,
    variants: Mapping[str, Stage],
    outcomes: Mapping[str, Outcome],
) -> dict[str, Component]:
    """Return the components of the model, then the step graphs, which are always in fp32."""

    def component(spec: ComponentSpec, precisions: tuple[str, ...]) -> Component:
        graphs = graph_files(spec.name, precisions, outcomes)
        built = () if engines is None else (engine_of(plan, spec.name, precisions[-1], engines),)
        return Component(spec, graphs, built)

    components = {name: component(spec, options.precisions) for name, spec in plan.model.components.items()}
    for engine, stage in variants.items():
        file = graph_file(UNET, "fp32", engine)
        if file in outcomes[stage.name].files:
            variants_of_unet = {**components[UNET].variants, engine: {"fp32": file}}
            components[UNET] = replace(components[UNET], variants=variants_of_unet)
    return components | {name: component(spec, ("fp32",)) for name, spec in model_steps(plan.model).items()}


def build_request(checkpoint: Checkpoint, options: BuildOptions, quantize: tuple[str, ...]) -> dict[str, Any]:
    """Return the manifest's entry about the build request; it does not depend on this machine."""
    request: dict[str, Any] = {
        "checkpoint": checkpoint.folder.resolve().name,
        "precision": options.precision,
        "quantize": list(quantize),
    }
    if options.engines is not None:
        engines = asdict(options.engines)
        request["engines"] = {
            "target": engines["target"],
            "compute_capabilities": list(engines["compute_capabilities"]),
            "bounds": {name: list(bounds) for name, bounds in engines["bounds"]},
            "refittable": engines["refittable"],
        }
    if checkpoint.random_seed is not None:
        return {**request, "random_weights_seed": checkpoint.random_seed}
    return {**request, CHECKPOINT_SHA256: weights_sha256(checkpoint.folder)}


def same_build(previous: Bundle, manifest: Manifest) -> bool:
    """True if the previous bundle equals this build apart from added reports and measurements."""
    before = previous.manifest
    try:
        for name in before.files.keys() - manifest.files.keys():
            previous.file(name)
    except ManifestError:
        return False  # a damaged report: write the bundle without reports
    return (before.stages, before.components, before.request, before.model) == (
        manifest.stages,
        manifest.components,
        manifest.request,
        manifest.model,
    )
