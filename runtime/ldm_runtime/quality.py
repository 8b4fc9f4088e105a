"""Measured settings of a bundle: seconds per image and image quality.

``ldm-export bench --quality --save`` writes the record, ``Bundle.quality`` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.json_fields import (
    require_integer,
    require_list,
    require_map,
    require_number,
    require_object,
    require_str,
)
from ldm_runtime.number_checks import number
from ldm_runtime.request import RequestOptions

__all__ = ["MEASURE", "QualityRecord", "QualityResult", "QualitySetting"]

MEASURE = "`ldm-export bench BUNDLE --quality --save`"
"""The command that measures settings, for messages."""
MAX_SETTINGS, MAX_VALUE = 1024, 10**6
"""Maximum number of settings in a record, and largest number in it."""
_COUNTS = ("steps", "cache_every", "guidance_every")


@dataclass(frozen=True)
class QualitySetting:
    """One way to generate an image.

    Attributes:
        precision: Precision of the graphs.
        steps, cache_every, guidance_every: Fields of ``Request``; ``steps`` is ``num_inference_steps``.
    """

    precision: str
    steps: int
    cache_every: int = 1
    guidance_every: int = 1

    @property
    def options(self) -> RequestOptions:
        """The fields of a ``Request``; ``precision`` is an option of ``LatentDiffusionPipeline.from_bundle``."""
        return {
            "num_inference_steps": self.steps,
            "cache_every": self.cache_every,
            "guidance_every": self.guidance_every,
        }

    def __str__(self) -> str:
        parts = [self.precision, f"{self.steps} steps"]
        parts += [f"cache_every {self.cache_every}"] if self.cache_every != 1 else []
        return ", ".join([*parts, *([f"guidance_every {self.guidance_every}"] if self.guidance_every != 1 else [])])


@dataclass(frozen=True)
class QualityResult:
    """A setting with its time and quality.

    Attributes:
        setting: The setting.
        seconds: Median of all images.
        mean_psnr, worst_psnr: Mean and lowest PSNR in dB against the images of the reference, over the images that
            differ; None if all are equal.
        correct: Share of images, 0 to 1, that show what their prompts describe; None without a grader.
    """

    setting: QualitySetting
    seconds: float
    mean_psnr: float | None
    worst_psnr: float | None
    correct: float | None = None

    def reaches(self, min_psnr: float) -> bool:
        """True if every image has at least this PSNR."""
        return self.worst >= min_psnr

    def as_correct(self, share: float | None) -> bool:
        """True if at least this share of the images is correct; False without a grader."""
        return self.correct is not None and share is not None and self.correct >= share

    @property
    def worst(self) -> float:
        """The least PSNR in dB, infinite if all images are equal."""
        return math.inf if self.worst_psnr is None else self.worst_psnr

    def facts(self) -> dict[str, Any]:
        """Values for JSON."""
        facts = asdict(self)
        return {**facts.pop("setting"), **facts}


@dataclass(frozen=True)
class QualityRecord:
    """Settings that were measured alternately in one run, with the same requests and seeds.

    Attributes:
        results: Results. The first is the reference: fp32, the model's default number of steps, no feature caching.
        images: Number of images for each setting.
        engines: Precision -> the engine and device that ran it, e.g. "onnxruntime on cpu".
        options: Fields of the requests that differ from the model's defaults, e.g. ``guidance_scale``.
    """

    results: tuple[QualityResult, ...]
    images: int
    engines: Mapping[str, str]
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def reference(self) -> QualityResult:
        """The setting with which all others are compared."""
        return self.results[0]

    def fastest(self, min_psnr: float, precision: str | None = None) -> QualityResult:
        """The fastest setting whose images all have at least ``min_psnr`` dB. The reference always qualifies.

        Args:
            min_psnr: PSNR in dB.
            precision: Only settings of this precision qualify; None admits all.

        Raises:
            SpecError: ``min_psnr`` is not a finite number, or no setting of the precision has it.
        """
        return min(self._good(number("min_psnr", min_psnr), precision), key=_seconds)

    def fewest_steps(self, min_psnr: float | None = None, precision: str | None = None) -> QualityResult:
        """The good enough setting with the fewest steps, the fastest of several. The reference is always good enough.

        Args:
            min_psnr: PSNR in dB that every image must have. None requires as many correct images as the reference
                instead, because an image of fewer steps differs but may be as good.
            precision: As in ``fastest``.

        Raises:
            SpecError: ``min_psnr`` is not a finite number; it is None, and the images were not graded; or no setting
                is good enough.
        """
        least = None if min_psnr is None else number("min_psnr", min_psnr)
        return min(self._good(least, precision), key=_steps)

    def measured(self, result: QualityResult) -> str:
        """Describe the measurement of a setting."""
        faster = self.reference.seconds / result.seconds
        how = f"{self.images} images, {self.engines.get(result.setting.precision, 'unknown engine')}"
        return f"{faster:.2f}× as fast as {self.reference.setting}, {self._figures(result)} ({how})"

    def facts_of(self, precision: str) -> list[dict[str, Any]]:
        """JSON-able values of the settings of a precision."""
        return [one.facts() for one in self.results if one.setting.precision == precision]

    def to_json(self) -> dict[str, Any]:
        """Values for JSON, which ``from_json`` reads."""
        facts = {"images": self.images, "engines": dict(self.engines), "options": dict(self.options)}
        return {**facts, "settings": [one.facts() for one in self.results]}

    @classmethod
    def from_json(cls, where: str, document: Mapping[str, Any]) -> QualityRecord:
        """Read the record of a bundle, which is untrusted.

        Args:
            where: The file, for error messages.
            document: Its content.

        Raises:
            ManifestError: A field is missing or has another type.
        """
        entries = require_list(f"{where}: settings", document.get("settings"), MAX_SETTINGS)
        results = tuple(_result(f"{where}: settings[{index}]", entry) for index, entry in enumerate(entries))
        if not results or results[0].worst_psnr is not None:
            raise ManifestError(f"{where}: settings: got no reference in the first place; measure the bundle again")
        return cls(
            results,
            require_integer(f"{where}: images", document.get("images"), 1, MAX_VALUE),
            require_map(f"{where}: engines", document.get("engines"), require_str),
            require_map(f"{where}: options", document.get("options"), _number),
        )

    def _good(self, min_psnr: float | None, precision: str | None) -> list[QualityResult]:
        """Settings of a precision that have a PSNR in every image or, with None, as many correct images."""
        least = self.reference.correct
        if min_psnr is None and least is None:
            raise SpecError(
                "steps: got auto without a budget, but no grader decides which images of this model are correct; give "
                "a budget in dB too, e.g. 35"
            )
        usable = [one for one in self.results if precision in (None, one.setting.precision)]
        good = [one for one in usable if (one.as_correct(least) if min_psnr is None else one.reaches(min_psnr))]
        if good:
            return good
        asked = "steps: got auto" if min_psnr is None else f"budget: got {min_psnr:g} dB"
        if not usable:
            known = ", ".join(dict.fromkeys(one.setting.precision for one in self.results))
            raise SpecError(
                f"{asked}, but the settings of this bundle were measured in {known}, not in {precision}; "
                f"measure it with {MEASURE[:-1]} --precision {precision}`"
            )
        best = max(usable, key=(lambda one: one.correct or 0.0) if min_psnr is None else (lambda one: one.worst))
        raise SpecError(
            f"{asked}, but no setting that was measured in {precision} is good enough; the best has "
            f"{self._figures(best)}; ask for less, or measure more settings with {MEASURE}"
        )

    def _figures(self, result: QualityResult) -> str:
        worst, mean = result.worst_psnr, result.mean_psnr
        images = "equal images" if worst is None or mean is None else f"worst {worst:.1f} dB, mean {mean:.1f} dB"
        return images + ("" if result.correct is None else f", {result.correct:.0%} correct")


def _result(where: str, value: Any) -> QualityResult:
    entry = require_object(where, value)
    setting = QualitySetting(
        require_str(f"{where}.precision", entry.get("precision")),
        *(require_integer(f"{where}.{name}", entry.get(name), 1, MAX_VALUE) for name in _COUNTS),
    )
    seconds = require_number(f"{where}.seconds", entry.get("seconds"), 1e-9, MAX_VALUE)
    optional = ((name, entry.get(name)) for name in ("mean_psnr", "worst_psnr", "correct"))
    figures = (None if figure is None else _number(f"{where}.{name}", figure) for name, figure in optional)
    return QualityResult(setting, seconds, *figures)


def _number(where: str, value: Any) -> float:
    return require_number(where, value, -MAX_VALUE, MAX_VALUE)


def _seconds(result: QualityResult) -> float:
    return result.seconds


def _steps(result: QualityResult) -> tuple[int, float]:
    return result.setting.steps, result.seconds
