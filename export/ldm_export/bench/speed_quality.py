"""Measures speed against image quality for combinations of steps, feature caching, reused guidance and precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ldm_export.requests import RequestFields
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import SpecError
from ldm_runtime.images import psnr
from ldm_runtime.model import SHALLOW_UNET
from ldm_runtime.number_checks import integer
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.quality import QualityRecord, QualityResult, QualitySetting

if TYPE_CHECKING:
    from ldm_calibration.settings import Grade

__all__ = ["measure_quality", "quality_settings"]

MAX_SETTINGS, MAX_STEPS = 128, 1000
CACHE_EVERY, GUIDANCE_EVERY = (1, 2, 3, 5), (1, 3)
WARM_UP_STEPS = 4

Pixels = NDArray[np.uint8]


def quality_settings(
    bundle: Bundle, steps: Sequence[int] | None = None, precisions: Sequence[str] = ()
) -> tuple[QualitySetting, ...]:
    """Settings to compare. The first is the reference: fp32, the model's number of steps, every step computed whole.

    Args:
        bundle: Its graphs decide which options apply.
        steps: Numbers of denoising steps besides the model's own; None takes half of them.
        precisions: Precisions besides fp32.

    Raises:
        SpecError: A number of steps out of range, or too many settings.
    """
    model = bundle.manifest.model
    most = model.defaults.num_inference_steps
    others = (max(1, most // 2),) if steps is None else tuple(integer("steps", one, 1, MAX_STEPS) for one in steps)
    caching = CACHE_EVERY if SHALLOW_UNET in model.components else (1,)
    guiding = GUIDANCE_EVERY if model.guidance and model.defaults.guidance_scale != 1 else (1,)
    every = dict.fromkeys(("fp32", *precisions))
    settings = tuple(QualitySetting(*one) for one in product(every, dict.fromkeys((most, *others)), caching, guiding))
    if len(settings) > MAX_SETTINGS:
        raise SpecError(
            f"quality: got {len(settings)} settings, expected at most {MAX_SETTINGS}; give fewer precisions or steps"
        )
    return settings


def measure_quality(
    settings: Sequence[QualitySetting],
    requests: Sequence[RequestFields],
    open_pipeline: Callable[[str], LatentDiffusionPipeline],
    grade: Grade | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> QualityRecord:
    """Generate the image of each request, with seeds 0, 1, …, with every setting in turn.

    Args:
        settings: The first is the reference.
        requests: One image each.
        open_pipeline: Opens the bundle in a precision. Its pipelines are closed at the end.
        grade: Decides which images are correct; None skips that.
        on_progress: Called with the setting, the number of finished images, and the number of all images.

    Raises:
        SpecError: The model does not take a value.
        BackendError: The engine does not run a precision.
    """
    seconds: list[list[float]] = [[] for _ in settings]
    images: list[list[Pixels]] = [[] for _ in settings]
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
                started = time.perf_counter()
                result = pipeline(**{**pipeline.example(request), **request, **setting.options, "seed": seed})
                image = np.asarray(result.images[0])
                seconds[number].append(time.perf_counter() - started)
                images[number].append(image)
        engines = {precision: _engine(pipeline) for precision, pipeline in pipelines.items()}
    correct = [None if grade is None else grade(own, requests) for own in images]
    rows = zip(settings, seconds, images, correct, strict=True)
    results = tuple(_result(setting, times, (own, images[0]), right) for setting, times, own, right in rows)
    return QualityRecord(results, len(requests), engines)


def _engine(pipeline: LatentDiffusionPipeline) -> str:
    choice = pipeline.choice
    return "unknown engine" if choice is None else f"{choice.backend} on {choice.device}"


def _result(
    setting: QualitySetting,
    seconds: Sequence[float],
    images: tuple[Sequence[Pixels], Sequence[Pixels]],
    correct: list[bool] | None,
) -> QualityResult:
    pairs = zip(*images, strict=True)
    decibels = [psnr(one.astype(np.float64), other.astype(np.float64), 255.0) for one, other in pairs]
    known = [value for value in decibels if value is not None]
    mean, worst = (float(np.mean(known)), min(known)) if known else (None, None)
    share = None if correct is None else float(np.mean(correct))
    return QualityResult(setting, float(np.median(seconds)), mean, worst, share)
