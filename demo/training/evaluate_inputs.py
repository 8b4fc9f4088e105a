"""Measures the super-resolution and the inpainting model: bundles of them enlarge and redraw held-out images.

Every image is compared with what is there without a model: bicubic enlargement, and a mask filled with the colour of
the background.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_export_demo.inputs import MASKS, low_resolution, masked_trials, trial_images
from ldm_export_demo.restoration import InpaintingGrade, filled, grade_inpainting, psnr, shows_the_same
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle

Pixels = NDArray[np.uint8]
PROPERTIES = ("correct", "unchanged", "continued", "redrawn")
DIGITS = 4


@dataclass(frozen=True)
class Settings:
    """Sampling settings of one measurement; batch ``i`` has the seed ``seed + i``."""

    steps: int
    eta: float
    seed: int
    batch: int

    def images(self, pipeline: LatentDiffusionPipeline, **inputs: NDArray[np.uint8]) -> list[Pixels]:
        """One image, uint8 [64, 64, 3], for each input; ``inputs`` are the fields of a request, [N, ...] each."""
        images: list[Pixels] = []
        for index, start in enumerate(range(0, len(next(iter(inputs.values()))), self.batch)):
            part = {name: values[start : start + self.batch] for name, values in inputs.items()}
            done = pipeline(**part, seed=self.seed + index, eta=self.eta, num_inference_steps=self.steps)
            images += [np.asarray(image) for image in done.images]
        return images


def super_resolution(pipeline: LatentDiffusionPipeline, count: int, settings: Settings) -> dict[str, object]:
    """PSNR in dB, and the share of images that show the same as the original, for the model and bicubic enlargement."""
    originals = trial_images(count)
    bicubic = [
        np.asarray(Image.fromarray(low_resolution(image)).resize(image.shape[1::-1], Image.Resampling.BICUBIC))
        for image in originals
    ]
    images = settings.images(pipeline, image=np.stack([low_resolution(image) for image in originals]))
    triples = zip(images, bicubic, originals, strict=True)
    return {
        "images": count,
        "model": _against(images, originals),
        "bicubic": _against(bicubic, originals),
        "better_than_bicubic": _share([psnr(one, o) > psnr(other, o) for one, other, o in triples]),
    }


def inpainting(pipeline: LatentDiffusionPipeline, count: int, settings: Settings) -> dict[str, object]:
    """Shares of images with each property of ``InpaintingGrade`` by kind of mask, for the model and the plain fill."""
    trials = masked_trials(count)
    image, mask = (np.stack([getattr(one, name) for one in trials]) for name in ("image", "mask"))
    images = settings.images(pipeline, image=image, mask=mask[..., None])
    results = {
        "model": [grade_inpainting(one, trial) for one, trial in zip(images, trials, strict=True)],
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
    parser.add_argument("--count", type=int, default=120, help="number of images")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--eta", type=float, help="noise added at each step (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--json", type=Path, help="file to write the figures and settings to")
    args = parser.parse_args()
    if args.count < len(MASKS):
        parser.error(f"--count: got {args.count}, expected at least {len(MASKS)}")
    bundle = Bundle.open(args.bundle)
    defaults = bundle.manifest.defaults
    steps = defaults.num_inference_steps if args.steps is None else args.steps
    settings = Settings(steps, defaults.eta if args.eta is None else args.eta, args.seed, args.batch)
    with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", precision="fp32") as pipeline:
        measured = TASKS[args.task](pipeline, args.count, settings)
    figures = {"settings": asdict(settings), **measured}
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
