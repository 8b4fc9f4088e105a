"""Stages that build TensorRT engines from the graphs of a build."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ldm_export.bundle.build_plan import BuildPlan
from ldm_export.bundle.stages import Stage
from ldm_export.engine.attention import unfused_warning
from ldm_export.engine.builder import build_engine
from ldm_export.engine.builder_package import check_request, engine_capabilities, open_package
from ldm_export.engine.process import build_in_subprocess
from ldm_export.engine.profiles import latent_bounds
from ldm_export.engine.request import EngineJob, EngineRequest
from ldm_export.graph.model_specs import CHUNKS
from ldm_runtime.bundle_layout import engine_file, graph_file, precision_report
from ldm_runtime.engine_facts import EngineFacts, engine_from_json
from ldm_runtime.errors import BuildError
from ldm_runtime.model import SHALLOW_UNET, UNET, ModelDescription
from ldm_runtime.specs import Axis, ComponentSpec

__all__ = ["engine_of", "engine_stage", "in_latents"]

log = logging.getLogger(__name__)


def in_latents(request: EngineRequest, model: ModelDescription, precision: str) -> EngineRequest:
    """Check a request with bounds in pixels, convert them to latents, and add the rows for guidance.

    Raises:
        BuildError: The package is not installed or does not support the request, pixels are not a multiple of the
            model's factor, or there are bounds of chunks for a model that cuts long prompts off.
    """
    check_request(open_package(request.target), request, precision)
    factor = model.latents.factor
    axes = {dim.name for tensor in model.components[UNET].inputs for dim in tensor.shape if isinstance(dim, Axis)}
    if CHUNKS in dict(request.bounds) and CHUNKS not in axes:
        raise BuildError(f"{CHUNKS}: got bounds, but a {model.family} model cuts long prompts off; leave them out")
    bounds = tuple(
        (name, latent_bounds(name, sizes, factor) if name in ("height", "width") else sizes)
        for name, sizes in request.bounds
    )
    return replace(request, bounds=bounds, rows_per_image=max(1, len(model.guidance)))


def engine_stage(
    plan: BuildPlan, spec: ComponentSpec, precision: str, request: EngineRequest, sources: Mapping[str, str]
) -> Stage:
    """Return the stage that builds an engine from a component's graph and writes its facts, both in the work folder.

    Args:
        plan: Plan of the build.
        spec: Spec of the component.
        precision: The requested precision. A component without such a graph stays in fp32.
        request: Request for engines, with bounds in latents.
        sources: Graph file -> key of the stage that wrote it.

    Raises:
        BuildError: The package is not installed.
    """
    graph_precision = precision if graph_file(spec.name, precision) in sources else "fp32"
    name, file = f"{spec.name}.{precision}.{request.name}", engine_file(spec.name, precision, request.name)

    def run(folder: Path) -> list[str]:
        report = plan.work / precision_report(UNET if spec.name == SHALLOW_UNET else spec.name, graph_precision)
        islands = json.loads(report.read_text())["matrix_islands"] if report.is_file() else ()
        (folder / spec.name).mkdir()
        job = EngineJob(
            graph=plan.graph(spec.name, graph_precision),
            spec=spec,
            precision=graph_precision,
            request=request,
            target=folder / file,
            islands=tuple(islands),
            previous=plan.previous,
        )
        build = build_in_subprocess if spec.name in plan.model.components else build_engine  # step graphs are tiny
        built = build(job, lambda done, total: plan.on_progress(name, done, total))
        if warning := unfused_warning(spec.name, built):
            log.warning("%s", warning)
        facts = replace(built, file=file, precision=precision).to_json()
        _facts_file(folder, file).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        return [file, str(_facts_file(folder, file).relative_to(folder))]

    depends = {
        "graph": sources[graph_file(spec.name, graph_precision)],
        "request": repr(request),
        "version": open_package(request.target).__version__,
        "capabilities": engine_capabilities(request),
    }
    return Stage(name, depends, run)


def engine_of(plan: BuildPlan, component: str, precision: str, request: EngineRequest) -> EngineFacts:
    """Return the facts of an engine whose stage has run."""
    facts = _facts_file(plan.work, engine_file(component, precision, request.name))
    return engine_from_json(facts.name, json.loads(facts.read_text()))


def _facts_file(folder: Path, engine: str) -> Path:
    return folder / f"{engine}.json"
