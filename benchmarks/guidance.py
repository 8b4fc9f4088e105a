"""Measures how much work is saved by guidance in fewer steps, and how this changes the demo model's images.

The script measures the PSNR against the images of the fp32 graphs with guidance at every step, and the share of images
that show what the prompt says. Without int8 graphs in the bundle, only fp32 is measured.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_export_demo.grader import grade
from ldm_export_demo.grammar import held_out_prompts, parse
from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.guidance import StepBranches, step_branches
from ldm_runtime.images import psnr

SETTINGS = (
    *(((0.0, 1.0), every) for every in (1, 2, 3, 4)),
    *((interval, 1) for interval in ((0.0, 0.8), (0.0, 0.6), (0.1, 1.0), (0.2, 0.8))),
)
"""Pairs of guidance_interval and guidance_every. The first is the reference."""
OPTIONS: dict[str, Any] = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundle, prompts = Bundle.open(args.bundle), held_out_prompts(args.images // 2, args.images // 2)
    precisions = ("fp32", "int8") if bundle.precision == "int8" else ("fp32",)
    rows: list[dict[str, Any]] = []
    reference: list[np.ndarray] = []
    for precision in precisions:
        with LatentDiffusionPipeline.from_bundle(bundle, precision=precision, backend="openvino") as pipeline:
            for interval, every in track(SETTINGS, precision, console=Console(stderr=True)):
                options = OPTIONS | {"guidance_interval": interval, "guidance_every": every}
                generated = [pipeline(prompt, seed=seed, **options).images[0] for seed, prompt in enumerate(prompts)]
                images = [np.asarray(image).astype(float) for image in generated]
                reference = reference or images
                rows.append({"precision": precision, "interval": interval, "every": every} | facts(images, reference))
                correct = [
                    grade(np.asarray(one), parse(text)).correct for one, text in zip(generated, prompts, strict=True)
                ]
                rows[-1] |= {"rows_of_the_unet": share(interval, every), "correct": float(np.mean(correct))}
    table = Table(
        "graphs", "guidance_interval", "guidance_every", "UNet rows", "PSNR dB: mean", "median", "worst", "correct"
    )
    for row in rows:
        figures = ("–" if row[key] is None else f"{row[key]:.1f}" for key in ("mean_psnr", "median_psnr", "worst_psnr"))
        guided = "{:g} to {:g}".format(*row["interval"])
        work = f"{row['rows_of_the_unet']:.0%}"
        table.add_row(row["precision"], guided, str(row["every"]), work, *figures, f"{row['correct']:.0%}")
    Console().print(table)
    if args.json:
        document = {"images": args.images, **OPTIONS, "tools": {"openvino": version("openvino")}, "rows": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


def facts(images: list[np.ndarray], reference: list[np.ndarray]) -> dict[str, float | None]:
    """Return PSNR statistics of the images that differ from the reference; None if none does."""
    decibels = [psnr(one, other, 255.0) for one, other in zip(images, reference, strict=True)]
    values = [value for value in decibels if value is not None]
    measures = {"mean_psnr": np.mean, "median_psnr": np.median, "worst_psnr": np.min}
    return {name: float(measure(values)) if values else None for name, measure in measures.items()}


def share(interval: tuple[float, float], every: int) -> float:
    """Return the share of UNet rows that are computed, relative to guidance at every step."""
    steps = step_branches(interval, every, OPTIONS["num_inference_steps"])
    return sum(2 if step is StepBranches.BOTH else 1 for step in steps) / (2 * len(steps))


if __name__ == "__main__":
    main()
