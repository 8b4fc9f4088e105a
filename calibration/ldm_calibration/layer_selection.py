"""Selects the layers that become int8, component by component, within a budget that is checked on trial images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm_calibration.budget import LEAST_SHARE, Budget, Selection, costly, ranked, select
from ldm_calibration.graph_files import graph_digest, load_graph
from ldm_calibration.layers import find_layers
from ldm_calibration.model import CalibrationModel
from ldm_calibration.quality import Image
from ldm_calibration.record import Record, component_json, layer_json, make_record
from ldm_calibration.scalings import GraphScalings
from ldm_calibration.sensitivity import int8_backend
from ldm_calibration.settings import CalibrationSettings, Grade
from ldm_calibration.trajectories import F32, Trajectories
from ldm_calibration.trials import Comparison, TrialImages, compare_images, decode, generate
from ldm_runtime.backends import Backend
from ldm_runtime.errors import BuildError
from ldm_runtime.model import DECODER

__all__ = ["Measurements", "select_layers"]

DENOISER_RESERVE, RESERVE = 1.0, 0.3
"""Part of the budget in dB that the denoiser, and each other component but the last, leaves for later components."""
OWN_LOSS = 1.5
"""Maximum loss in dB by each component except the denoiser; such a component runs once per image and saves little."""
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measurements:
    """Measurements on which the selection is based.

    Attributes:
        scalings: Scalings of each component to quantize, the denoiser first.
        latent_db: Layer of the denoiser -> its sensitivity in dB; empty if layers are ranked by their own results.
        trajectories: Recorded trajectories. Their ranges become part of the record.
    """

    scalings: Mapping[str, GraphScalings]
    latent_db: Mapping[str, float]
    trajectories: Trajectories

    @property
    def denoiser(self) -> str:
        """Name of the denoiser."""
        return next(iter(self.scalings))

    def decibels(self, component: str) -> Mapping[str, float]:
        """Layer of a component -> signal-to-noise ratio by which it is ranked."""
        by_latents = component == self.denoiser and bool(self.latent_db)
        return self.latent_db if by_latents else self.scalings[component].output_db

    def costly(self, component: str) -> list[str]:
        """Layers that stay in float whatever the budget; none unless their effect on the latents was measured."""
        if component != self.denoiser:
            return []
        return costly(self.latent_db, self.scalings[component].flops)


def select_layers(
    model: CalibrationModel,
    settings: CalibrationSettings,
    measured: Measurements,
    grade: Grade | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Record:
    """Select layers of the denoiser first, then of each other component with the rest of the budget.

    Args:
        model: The model.
        settings: Trial requests and budget.
        measured: Measurements of each component to quantize.
        grade: Decides which trial images are correct.
        on_progress: Called with the number of finished steps and of all steps of the current trial.

    Raises:
        BuildError: The budget cannot be kept with a tenth of the denoiser's operations in int8 (the message says which
            budget can be kept), or the grader cannot grade the trial images.
    """
    trials = _Trials(model, settings, measured, grade, on_progress)
    if settings.max_accuracy_loss is not None and trials.best.correct_fp32 is None:
        raise BuildError(
            "max accuracy loss: the grader cannot grade the trial images of these requests; give --min-psnr instead"
        )
    selections = {}
    components = list(measured.scalings)
    for component in components:
        min_psnr = _min_psnr(settings, components, component, trials.best.psnr_mean)
        budget, flops = Budget(min_psnr, settings.max_accuracy_loss), measured.scalings[component].flops
        released = measured.costly(component)
        order = [name for name in ranked(measured.decibels(component), flops) if name not in released]

        def attempt(layers: Sequence[str], component: str = component) -> Comparison:
            return trials.attempt(component, layers)

        selection = select(released + order, flops, budget, attempt, len(released))
        if component == measured.denoiser and not selection.layers:
            raise BuildError(_cannot(settings, component, selection, len(components) > 1))
        trials.keep(component, selection)
        selections[component] = selection
    entries = {
        name: component_json(
            graph_digest(model.graphs[name]),
            measured.scalings[name],
            _layers(model, name, measured, selection),
            "" if selection.layers else _reason(selection),
        )
        for name, selection in selections.items()
    }
    recorded = measured.trajectories
    ranges = {
        "component": measured.denoiser,
        "timesteps": recorded.timesteps.tolist(),
        "tensors": {name: recorded.largest[:, i].tolist() for i, name in enumerate(recorded.sources)},
    }
    return make_record(settings.to_json(), entries, trials.best.to_json(settings.trial_requests), ranges)


class _Trials:
    """Generates trial images with the selections so far and a trial selection for one component."""

    def __init__(
        self,
        model: CalibrationModel,
        settings: CalibrationSettings,
        measured: Measurements,
        grade: Grade | None,
        on_progress: OnProgress,
    ):
        self._model, self._settings, self._measured = model, settings, measured
        self._grade, self._on_progress = grade, on_progress
        self._selected_backends: dict[str, Backend] = {}
        self._exact = self._generate({})
        self._latents: F32 = self._exact.latents
        self._latents_by_count: dict[int, F32] = {}
        self.best = self._compare(self._exact.images)

    def _generate(self, changed: Mapping[str, Backend]) -> TrialImages:
        return generate(self._model, self._settings, changed, self._on_progress)

    def _compare(self, images: Sequence[Image]) -> Comparison:
        return compare_images(self._exact.images, images, self._settings.trial_requests, self._grade)

    def attempt(self, component: str, layers: Sequence[str]) -> Comparison:
        """Compare images with these layers in int8. A trial of the decoder needs no new trajectories."""
        backend = self._backend(component, layers)
        if component == DECODER:
            return self._compare(decode(backend, self._model, self._latents))
        results = self._generate({**self._selected_backends, component: backend})
        self._latents_by_count[len(layers)] = results.latents
        return self._compare(results.images)

    def keep(self, component: str, selection: Selection) -> None:
        """Use this selection in all later trials."""
        if selection.layers and selection.comparison is not None:
            self._selected_backends[component] = self._backend(component, selection.layers)
            self._latents = self._latents_by_count.get(len(selection.layers), self._latents)
            self.best = selection.comparison
        self._latents_by_count = {}

    def _backend(self, component: str, layers: Sequence[str]) -> Backend:
        return int8_backend(self._model, component, self._measured.scalings[component].tensors, layers)


def _min_psnr(settings: CalibrationSettings, components: Sequence[str], component: str, best: float) -> float | None:
    """Minimum PSNR of a component's trials in dB; ``best`` is that of the selections so far."""
    denoiser, last = component == components[0], component == components[-1]
    reserve = 0.0 if last else DENOISER_RESERVE if denoiser else RESERVE
    min_psnr = None if settings.min_psnr is None else settings.min_psnr + reserve
    return min_psnr if denoiser else max(min_psnr or 0.0, best - OWN_LOSS)


def _layers(
    model: CalibrationModel, component: str, measured: Measurements, selection: Selection
) -> list[dict[str, Any]]:
    latent_db = measured.latent_db if component == measured.denoiser else {}
    released = measured.costly(component)
    entries = []
    for layer in find_layers(load_graph(model.graphs[component]).graph):
        why = layer.float_only or ("" if layer.name in selection.layers else "beyond the budget")
        if selection.layers and layer.name in released:
            why = "much error for its work"
        entries.append(layer_json(layer, measured.scalings[component], latent_db.get(layer.name), why))
    return entries


def _reason(selection: Selection) -> str:
    share, psnr = max(selection.attempts, key=lambda attempt: attempt[1])
    return f"beyond the budget: {psnr:.1f} dB with {share:.0%} of its work in int8"


def _cannot(settings: CalibrationSettings, denoiser: str, selection: Selection, others: bool) -> str:
    bounds = [] if settings.min_psnr is None else [f"{settings.min_psnr:g} dB"]
    bounds += [] if settings.max_accuracy_loss is None else [f"{settings.max_accuracy_loss:.1%} of the prompts"]
    can = "; ".join(f"{psnr:.1f} dB with {share:.0%} of the work in int8" for share, psnr in selection.attempts)
    best = max(psnr for _, psnr in selection.attempts) - (DENOISER_RESERVE if others else 0.0)
    advice = "Allow a greater loss" if settings.min_psnr is None else f"Ask for --min-psnr {best:.1f} or less"
    return (
        f"{denoiser}: the budget ({' and '.join(bounds)}) cannot be met with {LEAST_SHARE:.0%} of the work in int8. "
        f"What can be: {can}. {advice}, or use fp16"
    )
