"""Stages that write the files of a checkpoint, its fp32 graphs, and the step graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm_export.bundle.build_plan import BuildPlan, folder_digests, relative
from ldm_export.bundle.stages import Outcome, Stage
from ldm_export.checkpoint.modules import load_module
from ldm_export.graph.component_split import graph_spec, split_component
from ldm_export.graph.onnx_graph import INLINE_BYTES, OPSET, save_graph, trace_graph
from ldm_export.graph.passes.deep_features import expose_deep_features
from ldm_export.graph.step_graph import export_step, step_specs
from ldm_runtime.bundle_layout import graph_file
from ldm_runtime.model import UNET, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.specs import Axis, ComponentSpec

__all__ = ["FORM", "file_stages", "graph_stages", "model_steps", "split_model", "step_stages"]

FORM = 4
"""Version of the exported graphs. Increase it when the graphs of the same module change."""


def file_stages(plan: BuildPlan) -> list[Stage]:
    """Return the stages that write the family's files, for example ``tokenizer.json``."""
    files = plan.family.files
    return [_file_stage(plan, name) for name in files if files[name].source in plan.checkpoint.files]


def _file_stage(plan: BuildPlan, name: str) -> Stage:
    file = plan.family.files[name]

    def run(folder: Path) -> list[str]:
        file.write(plan.checkpoint, folder / file.path)
        return [file.path]

    inputs: dict[str, Any] = {"inputs": folder_digests(plan.checkpoint.files[file.source])}
    if added := plan.checkpoint.added_tokens.get(file.source):
        inputs["added_tokens"] = list(added)
    return Stage(name, {**inputs, "tools": dict(plan.tools)}, run)


def graph_stages(plan: BuildPlan) -> list[Stage]:
    """Return the stages that load, trace, split and free each component and write its fp32 graphs."""
    return [_graph_stage(plan, name) for name in plan.family.components if name in plan.model.components]


def _graph_stage(plan: BuildPlan, name: str) -> Stage:
    traced, spec = plan.family.components[name], plan.model.components[name]

    def run(folder: Path) -> list[str]:
        module = traced.wrap(load_module(plan.checkpoint, traced.module)).eval()
        files = []
        for component, model in split_component(trace_graph(module, spec), traced.splits).items():
            if component == UNET:
                expose_deep_features(model, plan.feature_cache)
            (folder / component).mkdir()
            files += save_graph(model, folder / graph_file(component, "fp32"))
        return relative(files, folder)

    component = plan.checkpoint.components[plan.checkpoint.layout.modules[traced.module].part]
    depends = {
        "inputs": {**folder_digests(component.folder), **component.depends},
        "spec": repr(spec),
        "splits": [rule.component for rule in traced.splits],
        "feature_cache": plan.feature_cache if name == UNET else 0,
        "seed": plan.checkpoint.random_seed,
        "opset": OPSET,
        "inline": INLINE_BYTES,
        "form": FORM,
        "tools": dict(plan.tools),
    }
    return Stage(f"{name}.fp32", depends, run)


def split_model(plan: BuildPlan, outcomes: Mapping[str, Outcome]) -> ModelDescription:
    """Return the model with the components of the bundle, read from the fp32 graphs in the work folder.

    Raises:
        BuildError: A graph has a dimension without bounds.
    """
    components: dict[str, ComponentSpec] = {}
    for name, traced in plan.family.components.items():
        if name not in plan.model.components:
            continue
        spec = plan.model.components[name]
        axes = {dim.name: dim for tensor in spec.inputs for dim in tensor.shape if isinstance(dim, Axis)}
        files = outcomes[f"{name}.fp32"].files
        splits = [rule for rule in traced.splits if graph_file(rule.component, "fp32") in files]
        for component, runs in (*((rule.component, rule.runs) for rule in splits), (name, spec.runs)):
            graph = plan.graph(component, "fp32")
            changed = splits or component == UNET
            components[component] = graph_spec(graph, component, runs, axes) if changed else spec
    return replace(plan.model, components=components)


def model_steps(model: ModelDescription) -> dict[str, ComponentSpec]:
    """Return the specs of the step graphs, which compute a scheduler's step on a device."""
    trajectory = scheduler_from_config(model.scheduler).trajectory(model.defaults.num_inference_steps)
    return step_specs(model.components[UNET], trajectory.slots, len(model.guidance))


def step_stages(plan: BuildPlan) -> list[Stage]:
    """Return the stages that write the step graphs."""
    return [_step_stage(plan, spec) for spec in model_steps(plan.model).values()]


def _step_stage(plan: BuildPlan, spec: ComponentSpec) -> Stage:
    def run(folder: Path) -> list[str]:
        (folder / spec.name).mkdir()
        return relative(export_step(spec, folder / graph_file(spec.name, "fp32")), folder)

    return Stage(f"{spec.name}.fp32", {"spec": repr(spec), "form": FORM, "tools": dict(plan.tools)}, run)
