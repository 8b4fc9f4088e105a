"""Seconds against image quality: steps, cached features, reused guidance and precisions that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_export.requests import RequestFields
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.images import psnr
from ldm_runtime.model import SHALLOW_UNET
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["QualityResult", "QualitySetting", "best", "measure_quality", "quality_settings"]

MAX_SETTINGS = 64
CACHE_EVERY, GUIDANCE_EVERY = (1, 2, 3, 5), (1, 3)
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class QualitySetting:
    """One way to generate an image.

    Attributes:
        precision: Precision of the graphs.
        steps, cache_every, guidance_every: Fields of ``Request``.
    """

    precision: str
    steps: int
    cache_every: int = 1
    guidance_every: int = 1

    def __str__(self) -> str:
        parts = [self.precision, f"{self.steps} steps"]
        parts += [f"cache_every {self.cache_every}"] if self.cache_every != 1 else []
        return ", ".join([*parts, *([f"guidance_every {self.guidance_every}"] if self.guidance_every != 1 else [])])


@dataclass(frozen=True)
class QualityResult:
    """A setting, the median seconds of an image, and the PSNR in dB against the first setting; None if all are equal.

    Attributes:
        setting: The setting.
        seconds: Median of all images.
        mean_psnr, worst_psnr: Mean and least over the images that differ.
    """

    setting: QualitySetting
    seconds: float
    mean_psnr: float | None
    worst_psnr: float | None

    def facts(self) -> dict[str, Any]:
        """JSON-able values."""
        facts = asdict(self)
        return {**facts.pop("setting"), **facts}


def quality_settings(bundle: Bundle, steps: int | None, precisions: Sequence[str] | None) -> tuple[QualitySetting, ...]:
    """Settings to compare; the first, fp32 with all steps whole, is the reference.

    Args:
        bundle: Its graphs decide which options apply.
        steps: Denoising steps, of which half are tried too; None takes the model's.
        precisions: Precisions besides fp32; None takes the bundle's own.
    """
    model = bundle.manifest.model
    most = model.defaults.num_inference_steps if steps is None else steps
    caching = CACHE_EVERY if SHALLOW_UNET in model.components else (1,)
    guiding = GUIDANCE_EVERY if model.guidance and model.defaults.guidance_scale != 1 else (1,)
    every = dict.fromkeys(("fp32", *(precisions or (bundle.precision,))))
    counts = dict.fromkeys((most, max(1, most // 2)))
    settings = tuple(QualitySetting(*one) for one in product(every, counts, caching, guiding))
    if len(settings) > MAX_SETTINGS:
        raise SpecError(
            f"quality: got {len(settings)} settings, expected at most {MAX_SETTINGS}; give fewer precisions"
        )
    return settings


def measure_quality(
    settings: Sequence[QualitySetting],
    requests: Sequence[RequestFields],
    open_pipeline: Callable[[str], LatentDiffusionPipeline],
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[QualityResult, ...]:
    """Generate each request's image with every setting in turn, with the seeds 0, 1, ….

    Args:
        settings: The first is the reference.
        requests: One image each.
        open_pipeline: Opens the bundle in a precision; closed at the end.
        on_progress: Called with the setting, the number of images done and of all images.

    Raises:
        SpecError: The model does not take a value.
        BackendError: The engine does not run a precision.
    """
    seconds: list[list[float]] = [[] for _ in settings]
    images: list[list[NDArray[np.float64]]] = [[] for _ in settings]
    with ExitStack() as stack:
        pipelines = {
            precision: stack.enter_context(open_pipeline(precision))
            for precision in dict.fromkeys(setting.precision for setting in settings)
        }
        total = len(settings) * len(requests)
        for pipeline in pipelines.values():
            caching = 1 + any(setting.cache_every != 1 for setting in settings)
            example = {**pipeline.example(requests[0]), **requests[0]}
            pipeline(**{**example, "num_inference_steps": WARM_UP_STEPS, "cache_every": caching})
        for seed, request in enumerate(requests):
            for number, setting in enumerate(settings):
                on_progress(str(setting), seed * len(settings) + number, total)
                pipeline = pipelines[setting.precision]
                options = asdict(setting)
                del options["precision"]
                options["num_inference_steps"] = options.pop("steps")
                started = time.perf_counter()
                result = pipeline(**{**pipeline.example(request), **request, **options, "seed": seed})
                image = np.asarray(result.images[0], np.float64)
                seconds[number].append(time.perf_counter() - started)
                images[number].append(image)
    return tuple(
        _result(setting, times, own, images[0]) for setting, times, own in zip(settings, seconds, images, strict=True)
    )


def _result(
    setting: QualitySetting,
    seconds: Sequence[float],
    images: Sequence[NDArray[np.float64]],
    reference: Sequence[NDArray[np.float64]],
) -> QualityResult:
    decibels = [psnr(one, other, 255.0) for one, other in zip(images, reference, strict=True)]
    known = [value for value in decibels if value is not None]
    figures = (float(np.mean(known)), min(known)) if known else (None, None)
    return QualityResult(setting, float(np.median(seconds)), *figures)


def best(results: Sequence[QualityResult], min_psnr: float) -> QualityResult:
    """The fastest setting whose images all have at least ``min_psnr`` dB; the reference always does."""
    return min((one for one in results if one.worst_psnr is None or one.worst_psnr >= min_psnr), key=_seconds)


def _seconds(result: QualityResult) -> float:
    return result.seconds
