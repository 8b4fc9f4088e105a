"""Settings of a calibration: observed requests, trial requests, and the quality to keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.inputs import json_fields
from ldm_calibration.model import ImageRequest, request_fields
from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import integer, number, shown

__all__ = ["CalibrationSettings", "Grade", "check_grade"]

Grade = Callable[[Sequence[NDArray[np.uint8]], Sequence[ImageRequest]], list[bool] | None]
"""Decides which images uint8 [H, W, 3] show what their requests describe; returns None if it cannot grade them."""
MAX_STEPS = 1000
SENSITIVITIES = ("latents", "results")
_BUDGET = ("trial_requests", "trial_steps", "min_psnr", "max_accuracy_loss")


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of a calibration, and the quality to keep.

    Attributes:
        requests: Fields of ``Request`` for each observed image, e.g. {"prompts": "a red circle"}, or {} for a model
            without conditioning. Image ``i`` has seed ``i``.
        trial_requests: The same for each trial image, with which the budget is checked. Image ``i`` has seed 1000 +
            ``i``.
        steps: Number of denoising steps of the observed images, over the whole schedule.
        samples: Number of steps of each observed image at which every tensor is observed.
        sensitivity: How layers are ranked: "latents" measures the effect of each layer on the final latents;
            "results" measures the error of the layer's own result, which is much faster for a large model.
        trial_steps: Denoising steps of the trial images; None takes the model's default.
        eta, guidance_scale: Values for all images; None takes the model's default.
        min_psnr: Minimum mean PSNR in dB of the trial images against fp32 images with the same seeds; None for no
            bound.
        max_accuracy_loss: Maximum loss of prompt accuracy against fp32, from 0 to 1; None for no bound. It needs a
            grader.

    Raises:
        SpecError: There are no requests, a request has an invalid field, or a number is out of range.
    """

    requests: tuple[ImageRequest, ...]
    trial_requests: tuple[ImageRequest, ...]
    steps: int = 20
    samples: int = 10
    sensitivity: str = "latents"
    trial_steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    min_psnr: float | None = 35.0
    max_accuracy_loss: float | None = None

    @property
    def observed(self) -> dict[str, Any]:
        """The settings on which ranges, scalings and sensitivities depend, as JSON values; this excludes the budget."""
        return {name: value for name, value in self.to_json().items() if name not in _BUDGET}

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values."""
        requests = {name: [json_fields(one) for one in getattr(self, name)] for name in ("requests", "trial_requests")}
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, **requests}

    def __post_init__(self) -> None:
        for name in ("requests", "trial_requests"):
            _check_requests(name, getattr(self, name))
        if self.sensitivity not in SENSITIVITIES:
            raise SpecError(f"sensitivity: got {shown(self.sensitivity)}, expected one of {', '.join(SENSITIVITIES)}")
        for name in ("steps", "samples", "trial_steps"):
            self._set(name, integer, 2, MAX_STEPS)
        self._set("eta", number, 0.0)
        self._set("guidance_scale", number)
        self._set("min_psnr", number, 0.0, 100.0)
        self._set("max_accuracy_loss", number, 0.0, 1.0)

    def _set(self, name: str, check: Callable[..., Any], *bounds: float) -> None:
        """Replace a number by the result of its check; None stays None."""
        if (value := getattr(self, name)) is not None or name in ("steps", "samples"):
            object.__setattr__(self, name, check(name.replace("_", " "), value, *bounds))


def check_grade(settings: CalibrationSettings, grade: Grade | None) -> None:
    """Check that there is a grader if there is a bound on prompt accuracy.

    Raises:
        SpecError: ``max_accuracy_loss`` is set and there is no grader.
    """
    if settings.max_accuracy_loss is not None and grade is None:
        raise SpecError(
            f"max accuracy loss: got {settings.max_accuracy_loss:g}, but no grader decides which images of this model "
            "are correct; give --min-psnr instead"
        )


def _check_requests(name: str, requests: Any) -> None:
    where = name.replace("_", " ")
    if not requests:
        raise SpecError(
            f"{where}: got none to calibrate with, expected at least one; give --prompts FILE or --inputs FOLDER"
        )
    for index, request in enumerate(requests):
        if not isinstance(request, Mapping) or (unknown := sorted(set(request) - request_fields())):
            got = f"field {unknown[0]!r:.40}" if isinstance(request, Mapping) else f"{type(request).__name__}"
            raise SpecError(f"{where}[{index}]: got {got}, expected only {', '.join(sorted(request_fields()))}")
