"""Stages of half precision: measure the ranges of all tensors, and rewrite the graphs accordingly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_calibration.inputs import json_fields
from ldm_calibration.model import CalibrationModel
from ldm_calibration.ranges import measure_ranges
from ldm_export.bundle.build_plan import BuildPlan, relative
from ldm_export.bundle.stages import Stage
from ldm_export.graph.islands import MARGIN
from ldm_export.graph.onnx_graph import load_graph, save_graph
from ldm_export.graph.passes.half_precision import half_precision
from ldm_export.requests import RequestFields
from ldm_runtime.backends.onnxruntime_session import load_onnxruntime
from ldm_runtime.bundle_layout import RANGES_REPORT, graph_file, precision_report

__all__ = ["RANGE_STEPS", "calibration_model", "half_stages", "ranges_stage"]

RANGE_STEPS = 10
"""Number of denoising steps of the trajectories on which ranges are measured."""
LARGEST_REPORTED = 8
"""Number of the largest ranges listed in the report on a half-precision graph."""


def calibration_model(plan: BuildPlan) -> CalibrationModel:
    """The model whose fp32 graphs are in the work folder."""
    return CalibrationModel(plan.model, plan.fp32_graphs(), lambda name: plan.work / name)


def ranges_stage(plan: BuildPlan, before: Mapping[str, str], requests: Sequence[RequestFields]) -> Stage:
    """Return the stage that measures the largest magnitude of each tensor over denoising trajectories.

    Args:
        plan: Plan of the build; the fp32 graphs are in the work folder.
        before: Stage -> key of the stages that wrote the graphs and the files of the conditioning.
        requests: One image each.
    """

    def run(folder: Path) -> list[str]:
        ranges = measure_ranges(
            calibration_model(plan),
            requests,
            RANGE_STEPS,
            lambda done, total: plan.on_progress("ranges", done, total),
        )
        report = folder / RANGES_REPORT
        report.parent.mkdir()
        report.write_text(json.dumps(ranges, indent=1, sort_keys=True) + "\n")
        return [RANGES_REPORT]

    depends = {
        "stages": dict(before),
        "scheduler": dict(plan.model.scheduler),
        "requests": [json_fields(request) for request in requests],
        "steps": RANGE_STEPS,
        "tools": {**plan.tools, "onnxruntime": load_onnxruntime().__version__},
    }
    return Stage("ranges", depends, run)


def half_stages(plan: BuildPlan, precision: str, ranges: Stage) -> list[Stage]:
    """Return a stage for each component that converts its fp32 graph and reports the operators that stay in fp32."""
    names = [name for name in plan.model.components if name not in plan.family.precise]
    return [_half_stage(plan, name, precision, ranges) for name in names]


def _half_stage(plan: BuildPlan, name: str, precision: str, ranges: Stage) -> Stage:
    def run(folder: Path) -> list[str]:
        measured = json.loads((plan.work / RANGES_REPORT).read_text())[name]
        half = half_precision(precision, measured)(load_graph(plan.graph(name, "fp32")))
        (folder / name).mkdir()
        files = save_graph(half.model, folder / graph_file(name, precision))
        largest = sorted(measured.items(), key=lambda item: -item[1])[:LARGEST_REPORTED]
        facts = {
            "half": half.changes,
            "islands": dict(half.islands),
            "matrix_islands": list(half.matrix_islands),
            "largest": dict(largest),
        }
        report = folder / precision_report(name, precision)
        report.parent.mkdir()
        report.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        return relative([*files, report], folder)

    depends = {"ranges": ranges.key, "precision": precision, "margin": MARGIN}
    return Stage(f"{name}.{precision}", depends, run)
