"""Runs a calibration in parts: trajectories, ranges and scalings, sensitivities, selection of layers.

1. Trajectories: the fp32 model runs the requests of the settings, and the inputs of each component are recorded.
2. Scalings of each quantized component: tensors are observed on the inputs of three quarters of the requests, and the
   best scaling of each tensor is searched on the inputs of the other requests.
3. Sensitivity of each layer of the denoiser.
4. Selection of the layers that become int8, within the budget on trial images.

The results of parts 1 to 3 do not depend on the budget. Each is written to one file, so that a killed calibration
resumes after its last finished part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm_calibration.graph_files import load_graph
from ldm_calibration.layer_selection import Measurements, select_layers
from ldm_calibration.layers import find_layers
from ldm_calibration.model import CalibrationModel
from ldm_calibration.observation import observe
from ldm_calibration.record import Record
from ldm_calibration.sampling import split_feeds
from ldm_calibration.scaling_search import search_scalings
from ldm_calibration.scalings import GraphScalings
from ldm_calibration.sensitivity import measure_sensitivity
from ldm_calibration.settings import CalibrationSettings, Grade, check_grade
from ldm_calibration.trajectories import Trajectories, run_trajectories
from ldm_runtime.errors import BuildError

__all__ = ["Calibration", "OnProgress", "RunPart", "run_calibration"]

METHOD = 6
"""Version of the method. Increase it when equal settings give another record."""
PART = 16
"""Number of layers whose sensitivity is measured in one part."""
OnProgress = Callable[[str, int, int], None]
"""Called with the name of a part, its finished steps, and the number of its steps."""
RunPart = Callable[[str, Mapping[str, Any], Callable[[Path], None]], Path]
"""``run_part(name, depends, make)`` returns the file of a part. If there is no file with this name and these
dependencies (JSON values), it calls ``make(file)``, which writes it."""


@dataclass(frozen=True)
class Calibration:
    """A calibration to run.

    Attributes:
        model: The model.
        settings: Settings for observation and trials, and the budget.
        quantize: Components to quantize in this order, the denoiser first. Other components stay in fp32.
        grade: Decides which trial images are correct; None without a grader.

    Raises:
        BuildError: ``quantize`` is empty, or names a component the model does not have.
        SpecError: A bound on prompt accuracy is given without a grader.
    """

    model: CalibrationModel
    settings: CalibrationSettings
    quantize: tuple[str, ...]
    grade: Grade | None = None

    def __post_init__(self) -> None:
        check_grade(self.settings, self.grade)
        if missing := [name for name in self.quantize or ("",) if name not in self.model.graphs]:
            raise BuildError(
                f"int8: got component {missing[0]!r:.60} to quantize, expected some of {', '.join(self.model.graphs)}"
            )

    @property
    def depends(self) -> dict[str, Any]:
        """Everything that parts 1 to 3 depend on, except the model's files and installed packages, as JSON values."""
        return {
            "scheduler": dict(self.model.model.scheduler),
            "defaults": asdict(self.model.model.defaults),
            "settings": self.settings.observed,
            "quantize": list(self.quantize),
            "method": METHOD,
        }


def run_calibration(
    calibration: Calibration, run_part: RunPart, on_progress: OnProgress = lambda part, done, total: None
) -> Record:
    """Calibrate a model.

    Args:
        calibration: Model, settings, components to quantize, and grader.
        run_part: Runs a part, or finds its file.
        on_progress: Called while a part runs.

    Raises:
        BuildError: The model computes NaN, no layer of the denoiser can be int8, or the budget cannot be kept.
    """
    model, settings = calibration.model, calibration.settings
    quantize = _with_candidates(calibration)
    recorded = Trajectories.load(_trajectories(calibration, quantize, run_part, on_progress))
    scalings = {name: _scalings(calibration, recorded, name, run_part, on_progress) for name in quantize}
    latent_db = _sensitivities(calibration, scalings[quantize[0]], run_part, on_progress)
    measured = Measurements(scalings, latent_db, recorded)
    return select_layers(
        model, settings, measured, calibration.grade, lambda *count: on_progress("calibration.budget", *count)
    )


def _with_candidates(calibration: Calibration) -> tuple[str, ...]:
    """Return the components that have a layer which may be quantized."""
    graphs = calibration.model.graphs

    def candidates(component: str) -> bool:
        return any(not layer.float_only for layer in find_layers(load_graph(graphs[component]).graph))

    denoiser = calibration.quantize[0]
    if not candidates(denoiser):
        raise BuildError(f"{denoiser}: no layer of it can be int8; use fp16")
    return tuple(name for name in calibration.quantize if candidates(name))


def _trajectories(
    calibration: Calibration, quantize: tuple[str, ...], run_part: RunPart, on_progress: OnProgress
) -> Path:
    name = "calibration.trajectories"

    def make(file: Path) -> None:
        run_trajectories(
            calibration.model, calibration.settings, quantize, lambda *count: on_progress(name, *count)
        ).save(file)

    return run_part(name, calibration.depends, make)


def _scalings(
    calibration: Calibration, recorded: Trajectories, component: str, run_part: RunPart, on_progress: OnProgress
) -> GraphScalings:
    name = f"calibration.{component}"

    def make(file: Path) -> None:
        feeds, held_out = split_feeds(recorded, component, calibration.settings.samples)
        graph = calibration.model.graphs[component]
        observed = observe(graph, feeds, lambda *count: on_progress(f"{name}.ranges", *count))
        scalings = search_scalings(graph, observed, held_out, lambda *count: on_progress(f"{name}.scalings", *count))
        file.write_text(json.dumps(scalings.to_json()))

    return GraphScalings.from_json(json.loads(run_part(name, calibration.depends, make).read_text()))


def _sensitivities(
    calibration: Calibration, scalings: GraphScalings, run_part: RunPart, on_progress: OnProgress
) -> dict[str, float]:
    """Return layer -> sensitivity in dB of the final latents; empty if layers are ranked by their own results."""
    sensitivities: dict[str, float] = {}
    if calibration.settings.sensitivity == "results":
        return sensitivities
    layers, denoiser = list(scalings.output_db), calibration.quantize[0]
    for start in range(0, len(layers), PART):

        def make(file: Path, start: int = start) -> None:
            measured = measure_sensitivity(
                calibration.model,
                calibration.settings,
                denoiser,
                scalings.tensors,
                layers[start : start + PART],
                lambda done, total: on_progress("calibration.sensitivity", start + done, len(layers)),
            )
            file.write_text(json.dumps(measured))

        file = run_part(f"calibration.sensitivity.{start}", calibration.depends, make)
        sensitivities |= json.loads(file.read_text())
    return sensitivities
