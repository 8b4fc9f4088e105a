"""Decides which layers of which component become int8, within the budget on whole pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm_calibration.budget import LEAST_SHARE, Budget, Selection, ranked, select
from ldm_calibration.choices import Choices
from ldm_calibration.layers import find_layers
from ldm_calibration.quality import Grader
from ldm_calibration.record import Record, component_facts, graph_digest, layer_facts, make_record
from ldm_calibration.sensitivity import int8_backend
from ldm_calibration.sessions import load_graph
from ldm_calibration.settings import Settings
from ldm_calibration.trajectories import F32, Model, Trajectories
from ldm_calibration.trials import Comparison, Drawn, compare, decode, draw
from ldm_runtime.backends import Backend
from ldm_runtime.errors import BuildError, SpecError

RESERVE = {"unet": 1.0, "decoder": 0.3, "text_encoder": 0.0}
"""Decibels that each component in its turn leaves of the budget to those after it."""
OWN_LOSS = 1.5
"""Decibels that decoder and text encoder may each cost at most: they run once a picture, and save little time."""
Progress = Callable[[int, int], None]


def require_grader(settings: Settings, grade: Grader | None) -> None:
    """Check that prompt accuracy can be measured if it is bounded.

    Raises:
        SpecError: ``settings.max_accuracy_loss`` is set, but there is no grader.
    """
    if settings.max_accuracy_loss is not None and grade is None:
        raise SpecError(
            f"max accuracy loss: got {settings.max_accuracy_loss:g}, expected none, because this model's images have "
            "no grader; give --min-psnr instead"
        )


def select_layers(
    model: Model,
    settings: Settings,
    choices: Mapping[str, Choices],
    latent_db: Mapping[str, float],
    held: Trajectories,
    progress: Progress,
    grade: Grader | None = None,
) -> Record:
    """The UNet first, then the decoder and the text encoder with what the budget leaves; each trial draws pictures.

    Args:
        model, settings: as calibrated.
        choices: of each component.
        latent_db: sensitivity of the UNet's layers; empty where they are ranked by their results.
        held: the trajectories, whose ranges the record tells.
        progress: told steps done and in all of each trial.
        grade: decides which trial images match their prompts; ``settings.max_accuracy_loss`` needs it.

    Raises:
        SpecError: ``settings.max_accuracy_loss`` is set, but there is no grader, or it cannot grade the trial images.
        BuildError: the budget cannot be met with a tenth of the UNet's work in int8; the message says what can be.
    """
    require_grader(settings, grade)
    trials = _Trials(model, settings, choices, progress, grade)
    if settings.max_accuracy_loss is not None and trials.best.correct_fp32 is None:
        raise SpecError(
            "max accuracy loss: the grader cannot grade these images and prompts; use other prompts or --min-psnr"
        )
    selections = {}
    for component, reserve in RESERVE.items():
        of_results = component != "unet" or not latent_db
        order = ranked(choices[component].output_db if of_results else latent_db, choices[component].flops)
        wanted = None if settings.min_psnr is None else settings.min_psnr + reserve
        if component != "unet":
            wanted = max(wanted or 0.0, trials.best.psnr_mean - OWN_LOSS)
        budget = Budget(wanted, settings.max_accuracy_loss)
        found = select(order, choices[component].flops, budget, lambda layers: trials.attempt(component, layers))  # noqa: B023
        if component == "unet" and not found.layers:
            raise BuildError(_cannot(settings, found))
        trials.keep(component, found)
        selections[component] = found
    components = {
        name: component_facts(
            graph_digest(model.graphs[name]),
            choices[name],
            _layers(model, name, choices[name], latent_db if name == "unet" else {}, found),
            "" if found.layers else _left(found),
        )
        for name, found in selections.items()
    }
    ranges = {
        "timesteps": held.timesteps.tolist(),
        "tensors": {name: held.largest[:, i].tolist() for i, name in enumerate(held.sources)},
    }
    return make_record(settings, components, trials.best.pictures(settings.trial_prompts), ranges)


class _Trials:
    """Draws with the components chosen so far and one on trial."""

    def __init__(
        self, model: Model, settings: Settings, choices: Mapping[str, Choices], progress: Progress, grade: Grader | None
    ):
        self._model, self._settings, self._choices, self._progress = model, settings, choices, progress
        self._grade = grade
        self._kept: dict[str, Backend] = {}
        self.exact: Drawn = self._draw({})
        self._latents: F32 = self.exact.latents
        self._drawn: dict[int, F32] = {}
        self.best = self.compared(self.exact.pictures)

    def _draw(self, changed: Mapping[str, Backend]) -> Drawn:
        given = self._settings
        return draw(
            self._model,
            given.trial_prompts,
            given.trial_steps,
            given.eta,
            given.guidance_scale,
            changed,
            self._progress,
        )

    def compared(self, pictures: Sequence[Any]) -> Comparison:
        """These pictures against those of fp32."""
        return compare(self.exact.pictures, pictures, self._settings.trial_prompts, self._grade)

    def attempt(self, component: str, layers: Sequence[str]) -> Comparison:
        """What comes of these layers in int8. The decoder alone needs no new trajectories."""
        backend = self._backend(component, layers)
        if component == "decoder":
            return self.compared(decode(backend, self._model, self._latents))
        drawn = self._draw({**self._kept, component: backend})
        self._drawn[len(layers)] = drawn.latents
        return self.compared(drawn.pictures)

    def keep(self, component: str, found: Selection) -> None:
        """Have all later trials use this selection."""
        if found.layers and found.found is not None:
            self._kept[component] = self._backend(component, found.layers)
            self._latents = self._drawn.get(len(found.layers), self._latents)
            self.best = found.found
        self._drawn = {}

    def _backend(self, component: str, layers: Sequence[str]) -> Backend:
        choices = self._choices[component]
        return int8_backend(self._model, component, choices.scalings, choices.results, layers)


def _layers(
    model: Model, component: str, choices: Choices, latent_db: Mapping[str, float], found: Selection
) -> list[dict[str, Any]]:
    facts = []
    for layer in find_layers(load_graph(model.graphs[component]).graph):
        why = layer.float_only or ("" if layer.name in found.layers else "beyond the budget")
        facts.append(layer_facts(layer, choices.flops[layer.name], choices, latent_db.get(layer.name), why))
    return facts


def _left(found: Selection) -> str:
    share, psnr = max(found.tried, key=lambda tried: tried[1], default=(0.0, 0.0))
    return f"beyond the budget: {psnr:.1f} dB with {share:.0%} of its work in int8" if found.tried else "no matrix work"


def _cannot(settings: Settings, found: Selection) -> str:
    if not found.tried:
        return "unet: has no layer that can be int8; use fp16"
    asked = [] if settings.min_psnr is None else [f"{settings.min_psnr:g} dB"]
    asked += [] if settings.max_accuracy_loss is None else [f"{settings.max_accuracy_loss:.1%} of the prompts"]
    can = "; ".join(f"{psnr:.1f} dB with {share:.0%} of the UNet's work in int8" for share, psnr in found.tried)
    best = max(psnr for _, psnr in found.tried) - RESERVE["unet"]
    advice = "Allow a greater loss" if settings.min_psnr is None else f"Ask for --min-psnr {best:.1f} or less"
    return (
        f"unet: the budget ({' and '.join(asked)}) cannot be met with {LEAST_SHARE:.0%} of the work in int8. "
        f"What can be: {can}. {advice}, or use fp16"
    )
