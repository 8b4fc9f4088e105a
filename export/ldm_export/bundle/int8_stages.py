"""Stages of int8: one for the calibration record, and one for the int8 graph of each quantized component."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_calibration.calibration import Calibration, OnProgress, run_calibration
from ldm_calibration.graph_files import graph_digest, load_graph
from ldm_calibration.model import CalibrationModel
from ldm_calibration.qdq import insert_qdq
from ldm_calibration.record import read_record
from ldm_calibration.settings import CalibrationSettings, Grade
from ldm_export.bundle.stages import Outcome, Stage, run_stage
from ldm_export.graph.onnx_graph import save_graph
from ldm_runtime.bundle_layout import CALIBRATION_RECORD, graph_file, precision_report
from ldm_runtime.errors import BuildError

__all__ = ["PRECISION", "graph_files", "int8_stages", "is_int8_stage"]

PRECISION, REFERENCE = "int8", "fp32"
RECORD_STAGE = "calibration"
TOOLS = ("ldm-export", "onnx", "onnx-ir", "onnxruntime")
PARTS = "parts"


def int8_stages(
    work: Path,
    model: CalibrationModel,
    settings: CalibrationSettings | Path,
    quantize: tuple[str, ...],
    before: Mapping[str, str],
    on_progress: OnProgress,
    grade: Grade | None = None,
) -> list[Stage]:
    """Create the stage of the calibration record, and the stage of each component's int8 graph.

    Args:
        work: Folder of the build's finished stages, which contains ``model.graphs``.
        model: The model with its fp32 graphs.
        settings: Settings of the calibration, or an existing record to apply without measuring.
        quantize: Components to quantize in this order, the denoiser first.
        before: Stage -> key of the stages that wrote the fp32 graphs and the files of the conditioning.
        on_progress: Called with the name of a part, its finished steps, and the number of its steps.
        grade: Decides which trial images are correct.

    Raises:
        SpecError: A bound on prompt accuracy is given without a grader.
        BuildError: ``quantize`` names a component the model does not have.
        ManifestError: The existing record is damaged.
    """
    if isinstance(settings, Path):
        record = _existing_record(settings)
    else:
        record = _new_record(work, Calibration(model, settings, quantize, grade), before, on_progress)
    return [record, *(_int8_stage(work, name, model.graphs[name], record) for name in quantize)]


def is_int8_stage(name: str) -> bool:
    """True if a stage has a name that ``int8_stages`` gives."""
    return name == RECORD_STAGE or name.endswith(f".{PRECISION}")


def graph_files(component: str, precisions: Sequence[str], outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """Precision -> path of a component's graph; the fp32 graph if the component has none of that precision."""
    existing = {file for outcome in outcomes.values() for file in outcome.files}
    files = {precision: graph_file(component, precision) for precision in precisions}
    return {
        precision: file if file in existing else graph_file(component, REFERENCE) for precision, file in files.items()
    }


def _new_record(work: Path, calibration: Calibration, before: Mapping[str, str], on_progress: OnProgress) -> Stage:
    """Return the stage that calibrates the fp32 graphs. Its finished parts stay in ``work`` until the build ends."""
    tools = {name: version(name) for name in TOOLS}
    shared: dict[str, Any] = {"stages": dict(before), "tools": tools}

    def run_part(name: str, depends: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        file = f"{PARTS}/{name}"

        def run(folder: Path) -> list[str]:
            (folder / PARTS).mkdir()
            make(folder / file)
            return [file]

        run_stage(Stage(name, {**shared, **depends}, run), work, None)
        return work / file

    def run(folder: Path) -> list[str]:
        record = run_calibration(calibration, run_part, on_progress)
        (folder / CALIBRATION_RECORD).write_text(record.to_json())
        return [CALIBRATION_RECORD]

    budget = {"settings": calibration.settings.to_json(), "graded": calibration.grade is not None}
    return Stage(RECORD_STAGE, {**shared, **calibration.depends, **budget}, run)


def _existing_record(file: Path) -> Stage:
    content = read_record(file).to_json()

    def run(folder: Path) -> list[str]:
        (folder / CALIBRATION_RECORD).write_text(content)
        return [CALIBRATION_RECORD]

    return Stage(RECORD_STAGE, {"record": hashlib.sha256(content.encode()).hexdigest()}, run)


def _int8_stage(work: Path, component: str, source: Path, record: Stage) -> Stage:
    """Return the stage that writes a component's int8 graph and a report on its layers that stay in float.

    It writes nothing if the record keeps the whole component in fp32. Running it raises BuildError if the record is for
    another graph.
    """

    def run(folder: Path) -> list[str]:
        part = read_record(work / CALIBRATION_RECORD).components.get(component)
        if part is None:
            return []
        if part.graph != graph_digest(source):
            raise BuildError(
                f"{component}: {CALIBRATION_RECORD} was made for another fp32 graph; calibrate this bundle again"
            )
        if not part.chosen:
            return []
        target = folder / graph_file(component, PRECISION)
        target.parent.mkdir(parents=True)
        model = load_graph(source)
        quantized = insert_qdq(model, part.tensors, part.chosen)
        files = save_graph(model, target)
        float_layers = {layer["name"]: layer["why"] for layer in part.layers if not layer["int8"]}
        report = folder / precision_report(component, PRECISION)
        report.parent.mkdir()
        facts = {"int8": len(quantized), "islands": float_layers, "matrix_islands": list(float_layers)}
        report.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        return [str(file.relative_to(folder)) for file in (*files, report)]

    return Stage(f"{component}.{PRECISION}", {"record": record.key}, run)
