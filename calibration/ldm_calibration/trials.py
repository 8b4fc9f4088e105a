"""Pictures drawn on trial: with some components' graphs changed, against those of fp32 with the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_calibration.quality import Grader, Picture, mean_psnr, psnr, ssim
from ldm_calibration.trajectories import Model
from ldm_runtime.backends import Backend
from ldm_runtime.images import to_uint8
from ldm_runtime.request import Request

F32 = NDArray[np.float32]
FIRST_SEED = 1000
"""Seed of the first trial picture; those of calibration start from 0."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Final latents float32 [prompts, C, h, w] and pictures, one for each prompt."""

    latents: F32
    pictures: list[Picture]


@dataclass(frozen=True)
class Comparison:
    """Images compared with those of fp32: PSNR in dB (None if equal), SSIM, and whether each matches its prompt.

    ``correct_fp32`` and ``correct_int8`` are None without a grader, or if it cannot grade the images.
    """

    psnr: tuple[float | None, ...]
    ssim: tuple[float, ...]
    correct_fp32: tuple[bool, ...] | None
    correct_int8: tuple[bool, ...] | None

    def pictures(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Facts of each picture, JSON-able."""
        return [
            {
                "prompt": prompt,
                "seed": FIRST_SEED + i,
                "psnr": self.psnr[i],
                "ssim": self.ssim[i],
                "correct_fp32": None if self.correct_fp32 is None else self.correct_fp32[i],
                "correct_int8": None if self.correct_int8 is None else self.correct_int8[i],
            }
            for i, prompt in enumerate(prompts)
        ]

    @property
    def psnr_mean(self) -> float:
        """Mean PSNR in dB."""
        return mean_psnr(self.psnr)

    @property
    def accuracy_loss(self) -> float | None:
        """Prompt accuracy of fp32 minus prompt accuracy of int8, in [-1, 1]; None if the images are not graded."""
        if self.correct_fp32 is None or self.correct_int8 is None:
            return None
        return (sum(self.correct_fp32) - sum(self.correct_int8)) / len(self.correct_fp32)


def draw(
    model: Model,
    prompts: Sequence[str],
    steps: int,
    eta: float,
    guidance: float,
    changed: Mapping[str, Backend] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drawn:
    """One picture for each prompt; picture ``i`` has seed ``FIRST_SEED`` + i."""
    latents, pictures = [], []
    batches = model.batches(prompts)
    with model.pipeline(changed) as pipeline:
        for number, (texts, seeds) in enumerate(batches):
            request = Request(
                texts,
                seed=[FIRST_SEED + seed for seed in seeds],
                eta=eta,
                guidance_scale=guidance,
                num_inference_steps=steps,
            )
            for step in pipeline.steps(request):
                progress(number * step.total + step.index + 1, len(batches) * step.total)
                last = step.latents
            latents.append(last)
            pictures += [np.asarray(image) for image in pipeline.decode(last)]
    return Drawn(np.concatenate(latents), pictures)


def decode(decoder: Backend, model: Model, latents: F32) -> list[Picture]:
    """Pictures of latents, as many at once as ``model`` draws."""
    found: list[Picture] = []
    for _, seeds in model.batches([""] * len(latents)):
        found += list(to_uint8(decoder.run({"latents": latents[seeds]})["image"]))
    return found


def compare(
    exact: Sequence[Picture], found: Sequence[Picture], prompts: Sequence[str], grade: Grader | None = None
) -> Comparison:
    """Compare images with those of fp32; with a grader, also with their prompts."""
    pairs = list(zip(exact, found, strict=True))
    graded = [None if grade is None else grade(pictures, prompts) for pictures in (exact, found)]
    return Comparison(
        tuple(psnr(*pair) for pair in pairs),
        tuple(ssim(*pair) for pair in pairs),
        *(None if marks is None else tuple(marks) for marks in graded),
    )
