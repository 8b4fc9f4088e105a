"""Measures how half precision changes the demo model's images: fp32 and fp16 with the same prompts and seeds.

The figures are the PSNR (mean and worst) and, for each precision, the share of images that show what the prompt says.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_export_demo.grader import accuracy
from ldm_export_demo.grammar import held_out_prompts
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.images import psnr

BATCH = 10
EQUAL = 10 * math.log10(255**2 / 1e-10)
"""PSNR in dB that is used for two equal images."""


def images_of(bundle: Path, precision: str, prompts: list[str]) -> list[NDArray[np.uint8]]:
    """Return one image per prompt, uint8 [64, 64, 3]; batch ``i`` has seed ``i``; 50 steps, eta 0.3."""
    arrays = []
    with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend="onnxruntime") as pipeline:
        for start in track(range(0, len(prompts), BATCH), description=precision, console=Console(stderr=True)):
            generation = pipeline(prompts[start : start + BATCH], seed=start // BATCH, eta=0.3, guidance_scale=6.0)
            arrays += [np.asarray(image) for image in generation.images]
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes-fp16"), help="built with --precision fp16")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts, a third of them with one object")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    prompts = held_out_prompts(args.prompts // 3, args.prompts - args.prompts // 3)
    generated = {precision: images_of(args.bundle, precision, prompts) for precision in ("fp32", "fp16")}
    psnrs = [
        psnr(one.astype(float), other, 255.0) for one, other in zip(generated["fp32"], generated["fp16"], strict=True)
    ]
    decibels = np.array([EQUAL if value is None else value for value in psnrs])
    correct = {precision: accuracy(images, prompts).overall.correct for precision, images in generated.items()}
    pixels = [
        np.abs(one.astype(int) - other).max() for one, other in zip(generated["fp32"], generated["fp16"], strict=True)
    ]
    figures = {
        "prompts": len(prompts),
        "psnr_mean": float(decibels.mean()),
        "psnr_worst": float(decibels.min()),
        "max_pixel": int(max(pixels)),
        "correct": correct,
        "machine": platform.processor() or platform.machine(),
        "tools": {name: version(name) for name in ("onnxruntime", "numpy")},
    }
    table = Table("prompts", "PSNR mean, dB", "PSNR worst, dB", "largest difference", "correct fp32", "correct fp16")
    table.add_row(
        str(len(prompts)),
        f"{figures['psnr_mean']:.1f}",
        f"{figures['psnr_worst']:.1f}",
        f"{figures['max_pixel']}/255",
        f"{correct['fp32']:.1%}",
        f"{correct['fp16']:.1%}",
    )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
