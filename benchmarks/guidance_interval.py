"""Guidance on a part of the steps: the work it saves, and what it does to the shipped model's pictures.

PSNR against pictures guided throughout, and the share of pictures that the grader finds right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ldm_calibration.shapes.grader import grade
from ldm_calibration.shapes.grammar import held_out_prompts, parse
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.images import psnr

INTERVALS = ((0.0, 1.0), (0.0, 0.8), (0.0, 0.6), (0.1, 1.0), (0.2, 0.8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    prompts = held_out_prompts(args.pictures // 2, args.pictures // 2)
    options = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 50}
    rows, reference = [], []
    with LatentDiffusionPipeline.from_bundle(args.bundle, precision="fp32") as pipeline:
        for interval in INTERVALS:
            images = [
                pipeline(prompt, seed=seed, guidance_interval=interval, **options).images[0]
                for seed, prompt in enumerate(prompts)
            ]
            pictures = [np.asarray(image).astype(float) for image in images]
            reference = reference or pictures
            found = [psnr(one, other, 255.0) for one, other in zip(pictures, reference, strict=True)]
            decibels = [value for value in found if value is not None]
            right = [grade(np.asarray(one), parse(prompt)).right for one, prompt in zip(images, prompts, strict=True)]
            rows.append(
                {
                    "interval": interval,
                    "rows_of_the_unet": (1 + interval[1] - interval[0]) / 2,
                    "median_psnr": float(np.median(decibels)) if decibels else None,
                    "right": float(np.mean(right)),
                }
            )
    table = Table("guided steps", "UNet rows", "median PSNR dB", "right")
    for row in rows:
        told = "equal" if row["median_psnr"] is None else f"{row['median_psnr']:.1f}"
        table.add_row(
            "{:g} to {:g}".format(*row["interval"]), f"{row['rows_of_the_unet']:.0%}", told, f"{row['right']:.1%}"
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"pictures": args.pictures, **options, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
