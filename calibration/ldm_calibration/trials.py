"""Trial images: generates images with changed components, and compares them with fp32 images of the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.inputs import json_fields
from ldm_calibration.model import CalibrationModel, ImageRequest
from ldm_calibration.quality import Image, image_psnr, mean_psnr, ssim
from ldm_calibration.settings import CalibrationSettings, Grade
from ldm_runtime.backends import Backend
from ldm_runtime.images import to_uint8
from ldm_runtime.model import IMAGE, LATENTS

__all__ = ["FIRST_SEED", "Comparison", "TrialImages", "compare_images", "decode", "generate"]

F32 = NDArray[np.float32]
FIRST_SEED = 1000
"""Seed of the first trial image; the seeds of the observed images start from 0."""


@dataclass(frozen=True, eq=False)
class TrialImages:
    """Final latents float32 [images, C, h, w] and images, one for each trial request."""

    latents: F32
    images: list[Image]


@dataclass(frozen=True)
class Comparison:
    """Comparison of trial images with those of fp32.

    Attributes:
        psnr: PSNR of each image in dB; None if it equals the fp32 image.
        ssim: SSIM of each image.
        correct_fp32, correct_int8: For each image, whether it shows what its request describes; None if there is no
            grader, or if it cannot grade the images.
    """

    psnr: tuple[float | None, ...]
    ssim: tuple[float, ...]
    correct_fp32: tuple[bool, ...] | None = None
    correct_int8: tuple[bool, ...] | None = None

    def to_json(self, requests: Sequence[ImageRequest]) -> list[dict[str, Any]]:
        """Return an entry of JSON values for each image."""
        return [
            {
                "request": json_fields(request),
                "seed": FIRST_SEED + i,
                "psnr": self.psnr[i],
                "ssim": self.ssim[i],
                "correct_fp32": None if self.correct_fp32 is None else self.correct_fp32[i],
                "correct_int8": None if self.correct_int8 is None else self.correct_int8[i],
            }
            for i, request in enumerate(requests)
        ]

    @property
    def psnr_mean(self) -> float:
        """Mean PSNR in dB."""
        return mean_psnr(self.psnr)

    @property
    def accuracy_loss(self) -> float | None:
        """Prompt accuracy of fp32 minus that of these images; None if the images are not graded."""
        if self.correct_fp32 is None or self.correct_int8 is None:
            return None
        return (sum(self.correct_fp32) - sum(self.correct_int8)) / len(self.correct_fp32)


def generate(
    model: CalibrationModel,
    settings: CalibrationSettings,
    changed: Mapping[str, Backend] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrialImages:
    """Generate one image for each trial request; image ``i`` has seed ``FIRST_SEED + i``.

    Args:
        model: The model.
        settings: Trial requests, trial steps, eta and guidance scale.
        changed: Backends that replace those of the fp32 graphs.
        on_progress: Called with the number of finished steps and of all steps.
    """
    latents, images = [], []
    batches = model.batches(settings.trial_requests)
    with model.pipeline(changed) as pipeline:
        for number, batch in enumerate(batches):
            request = batch.request(
                FIRST_SEED,
                eta=settings.eta,
                guidance_scale=settings.guidance_scale,
                num_inference_steps=settings.trial_steps,
            )
            for step in pipeline.steps(request):
                on_progress(number * step.total + step.index + 1, len(batches) * step.total)
                last = step
            latents.append(last.latents)
            images += list(to_uint8(pipeline.decode_array(last.latents)))
    return TrialImages(np.concatenate(latents), images)


def decode(decoder: Backend, model: CalibrationModel, latents: F32) -> list[Image]:
    """Decode latents float32 [images, C, h, w] in calls of ``model.batch_size()`` images."""
    size = model.batch_size()
    parts = [latents[start : start + size] for start in range(0, len(latents), size)]
    return [image for part in parts for image in to_uint8(decoder.run({LATENTS: part})[IMAGE])]


def compare_images(
    exact: Sequence[Image], changed: Sequence[Image], requests: Sequence[ImageRequest], grade: Grade | None = None
) -> Comparison:
    """Compare images with those of fp32; grade both if there is a grader."""
    pairs = list(zip(exact, changed, strict=True))
    marks = [None if grade is None else grade(images, requests) for images in (exact, changed)]
    correct = [None if mark is None else tuple(mark) for mark in marks]
    return Comparison(
        tuple(image_psnr(*pair) for pair in pairs), tuple(ssim(*pair) for pair in pairs), correct[0], correct[1]
    )
