"""Measures the super-resolution and the inpainting model: bundles of them enlarge and redraw held-out images.

Every image is compared with what is there without a model: bicubic enlargement, and a mask filled with the colour of
the background.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_export_demo.inputs import MASKS, low_resolution, masked_trials, trial_images
from ldm_export_demo.restoration import InpaintingGrade, filled, grade_inpainting, psnr, shows_the_same
from ldm_runtime import LatentDiffusionPipeline

Pixels = NDArray[np.uint8]
PROPERTIES = ("correct", "unchanged", "continued", "redrawn")
DIGITS = 4


def enlarged(pipeline: LatentDiffusionPipeline, originals: list[Pixels], seed: int, steps: int | None) -> list[Pixels]:
    """Images, each uint8 [64, 64, 3], from the small versions of ``originals``; one seed for all."""
    small = np.stack([low_resolution(image) for image in originals])
    images = pipeline(image=small, seed=seed, num_inference_steps=steps).images
    return [np.asarray(image) for image in images]


def super_resolution(pipeline: LatentDiffusionPipeline, count: int, seed: int, steps: int | None) -> dict[str, object]:
    """PSNR in dB, and the share of images that show the same as the original, for the model and bicubic enlargement."""
    originals = trial_images(count)
    bicubic = [
        np.asarray(Image.fromarray(low_resolution(image)).resize(image.shape[1::-1], Image.Resampling.BICUBIC))
        for image in originals
    ]
    images = enlarged(pipeline, originals, seed, steps)
    triples = zip(images, bicubic, originals, strict=True)
    return {
        "images": count,
        "model": _against(images, originals),
        "bicubic": _against(bicubic, originals),
        "better_than_bicubic": _share([psnr(one, o) > psnr(other, o) for one, other, o in triples]),
    }


def inpainting(pipeline: LatentDiffusionPipeline, count: int, seed: int, steps: int | None) -> dict[str, object]:
    """Shares of images with each property of ``InpaintingGrade`` by kind of mask, for the model and the plain fill."""
    trials = masked_trials(count)
    image, mask = (np.stack([getattr(one, name) for one in trials]) for name in ("image", "mask"))
    images = pipeline(image=image, mask=mask[..., None], seed=seed, num_inference_steps=steps).images
    results = {
        "model": [grade_inpainting(np.asarray(one), trial) for one, trial in zip(images, trials, strict=True)],
        "background_fill": [grade_inpainting(filled(trial), trial) for trial in trials],
    }
    figures: dict[str, object] = {"images": count}
    for name, grades in results.items():
        chosen = {"all": grades} | {
            kind: [grade for grade, trial in zip(grades, trials, strict=True) if trial.kind == kind] for kind in MASKS
        }
        figures[name] = {kind: _shares(some) for kind, some in chosen.items()}
    return figures


def _against(images: list[Pixels], originals: list[Pixels]) -> dict[str, float]:
    pairs = list(zip(images, originals, strict=True))
    decibels = [psnr(*pair) for pair in pairs]
    return {
        "psnr": round(float(np.mean(decibels)), DIGITS),
        "psnr_lowest": round(min(decibels), DIGITS),
        "same": _share([shows_the_same(*pair) for pair in pairs]),
    }


def _shares(grades: list[InpaintingGrade]) -> dict[str, float]:
    return {name: _share([getattr(grade, name) for grade in grades]) for name in PROPERTIES}


def _share(results: list[bool]) -> float:
    return round(sum(results) / len(results), DIGITS)


TASKS = {"super-resolution": super_resolution, "inpainting": inpainting}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("bundle", type=Path, help="bundle of the demo model of this task")
    parser.add_argument("--count", type=int, default=200, help="number of images")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures and settings to")
    args = parser.parse_args()
    if args.count < len(MASKS):
        parser.error(f"--count: got {args.count}, expected at least {len(MASKS)}")
    with LatentDiffusionPipeline.from_bundle(args.bundle, precision="fp32") as pipeline:
        measured = TASKS[args.task](pipeline, args.count, args.seed, args.steps)
        default = pipeline.defaults
    settings = {
        "steps": args.steps or default.num_inference_steps,
        "eta": default.eta,
        "seed": args.seed,
    }
    figures = {"settings": settings, **measured}
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
