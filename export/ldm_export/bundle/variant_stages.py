"""Stages that write graphs for one engine: for ONNX Runtime on the CPU, and in fp16 for ONNX Runtime on CUDA."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.external_data import load_to_model

from ldm_export.bundle.build_plan import BuildPlan, relative
from ldm_export.bundle.graph_stages import FORM
from ldm_export.bundle.stages import Stage
from ldm_export.graph.islands import MARGIN
from ldm_export.graph.nodes import clear_range_names
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_export.graph.passes import ENGINE_PASSES, apply
from ldm_export.graph.passes.half_precision import half_precision
from ldm_runtime.bundle_layout import CPU_VARIANT, CUDA_VARIANT, RANGES_REPORT, graph_file, weights_beside
from ldm_runtime.model import DEEP_FEATURES, ModelDescription
from ldm_runtime.specs import Axis, ComponentSpec

__all__ = ["CUDA_PRECISION", "Variant", "cpu_variants", "cuda_variants", "write_cpu_variant"]

CUDA_PRECISION = "fp16"
"""Precision of the graphs for CUDA."""
FP32_INSIDE = ("LayerNormalization",)
"""Normalization operators that ONNX Runtime's CUDA kernels compute in fp32 internally."""


@dataclass(frozen=True)
class Variant:
    """A component's graph for one engine.

    Attributes:
        component, precision, engine: Component, precision and engine of the graph.
        stage: Writes the graph; it writes nothing if the engine's passes change nothing.
    """

    component: str
    precision: str
    engine: str
    stage: Stage

    @property
    def file(self) -> str:
        """Path of the graph in the bundle."""
        return graph_file(self.component, self.precision, self.engine)


def cpu_variants(plan: BuildPlan, sources: Mapping[str, str]) -> list[Variant]:
    """Return fp32 variants for ONNX Runtime on the CPU, for each component whose input grows with the image.

    They share the weights of the portable graphs.

    Args:
        plan: Plan of the build; the fp32 graphs are in the work folder.
        sources: Graph file -> key of the stage that wrote it.
    """
    grows = [name for name, spec in plan.model.components.items() if _has_height(spec)]
    return [_cpu_variant(plan, name, sources) for name in grows]


def _has_height(spec: ComponentSpec) -> bool:
    return any(isinstance(dim, Axis) and dim.name == "height" for tensor in spec.inputs for dim in tensor.shape)


def _cpu_variant(plan: BuildPlan, name: str, sources: Mapping[str, str]) -> Variant:
    def run(folder: Path) -> list[str]:
        target = folder / graph_file(name, "fp32", CPU_VARIANT)
        return relative([target], folder) if write_cpu_variant(plan.graph(name, "fp32"), target) else []

    stage = Stage(f"{name}.fp32.{CPU_VARIANT}", _depends(CPU_VARIANT, name, sources), run)
    return Variant(name, "fp32", CPU_VARIANT, stage)


def write_cpu_variant(source: Path, target: Path) -> bool:
    """Write a portable graph as rewritten for ONNX Runtime on the CPU; False if the passes change nothing.

    Weights in a file beside the portable graph are referenced, not copied.
    """
    result = apply(ir.load(source), ENGINE_PASSES[CPU_VARIANT])
    if not result.changes:
        return False
    target.parent.mkdir(exist_ok=True)
    if not weights_beside(source).exists():
        load_to_model(result.model)
    clear_range_names(result.model.graph)
    ir.save(result.model, target)
    return True


def cuda_variants(plan: BuildPlan, sources: Mapping[str, str], ranges: Stage) -> list[Variant]:
    """Return fp16 variants for ONNX Runtime on CUDA, for every component. They have their own weights.

    Tensors that pass between components, such as keys and values for the UNet, are fp16 outputs and inputs.

    Args:
        plan, sources: See ``cpu_variants``.
        ranges: Stage that measures the ranges of all tensors.
    """
    names = [name for name in plan.model.components if name not in plan.family.precise]
    return [_cuda_variant(plan, name, sources, ranges) for name in names]


def _cuda_variant(plan: BuildPlan, name: str, sources: Mapping[str, str], ranges: Stage) -> Variant:
    shared = _unet_tensors(plan.model)

    def run(folder: Path) -> list[str]:
        measured = json.loads((plan.work / RANGES_REPORT).read_text())[name]
        model = apply(load_graph(plan.graph(name, "fp32")), ENGINE_PASSES[CUDA_VARIANT]).model
        half = half_precision(CUDA_PRECISION, measured, fp32_inside=FP32_INSIDE, half_values=shared)
        model = half(model).model
        clear_range_names(model.graph)
        (folder / name).mkdir()
        return relative(save_graph(model, folder / graph_file(name, CUDA_PRECISION, CUDA_VARIANT)), folder)

    depends = _depends(CUDA_VARIANT, name, sources) | {"ranges": ranges.key, "margin": MARGIN, "half": list(shared)}
    return Variant(name, CUDA_PRECISION, CUDA_VARIANT, Stage(f"{name}.{CUDA_PRECISION}.{CUDA_VARIANT}", depends, run))


def _depends(engine: str, component: str, sources: Mapping[str, str]) -> dict[str, object]:
    names = [getattr(rewrite, "__name__", "") for rewrite in ENGINE_PASSES[engine]]
    return {"graph": sources[graph_file(component, "fp32")], "passes": names, "form": FORM}


def _unet_tensors(model: ModelDescription) -> Sequence[str]:
    """Names of the tensors that pass between the UNet, its shallow graph and the components that derive its inputs."""
    derived = [spec for runs in ("request", "schedule") for spec in model.once_per(runs)]
    return [*(tensor.name for spec in derived for tensor in spec.outputs), DEEP_FEATURES]
