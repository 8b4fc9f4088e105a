"""Measures how int8 changes the demo model's images: held-out prompts in fp32 and int8 with the same seeds.

Build the bundle with `ldm-export build --precision int8 -o build/shapes-int8`. Its quality budget was checked on other
prompts. The figures for each backend are PSNR, SSIM and the share of images that show what the prompt says.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_calibration.quality import Image, image_psnr, mean_psnr, ssim
from ldm_export.bench.figures import machine, versions
from ldm_export_demo import grade
from ldm_export_demo.grammar import held_out_prompts
from ldm_runtime import Bundle, LatentDiffusionPipeline

BATCH = 10
VARIANTS = (("onnxruntime", "int8"), ("openvino", "int8"))


def images_of(bundle: Path, backend: str, precision: str, prompts: list[str]) -> list[Image]:
    """Return one image per prompt, each with its own seed; 50 steps, eta 0.3, guidance 6."""
    arrays = []
    with LatentDiffusionPipeline.from_bundle(bundle, backend=backend, precision=precision) as pipeline:
        starts = range(0, len(prompts), BATCH)
        for start in track(starts, description=f"{backend} {precision}", console=Console(stderr=True)):
            some = prompts[start : start + BATCH]
            generation = pipeline(some, seed=list(range(start, start + len(some))), eta=0.3, guidance_scale=6.0)
            arrays += [np.asarray(image) for image in generation.images]
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes-int8"))
    parser.add_argument("--prompts", type=int, default=201, help="held-out prompts, a third of them with one object")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    report = json.loads(Bundle.open(args.bundle).file("report/int8.json").read_text())
    prompts = held_out_prompts(args.prompts // 3, args.prompts - args.prompts // 3)
    exact = images_of(args.bundle, "onnxruntime", "fp32", prompts)
    rows, table = [], Table("backend", "PSNR mean", "PSNR worst", "SSIM mean", "correct fp32", "correct int8")
    for backend, precision in VARIANTS:
        begun = time.perf_counter()
        quantized = images_of(args.bundle, backend, precision, prompts)
        decibels = [image_psnr(*pair) for pair in zip(exact, quantized, strict=True)]
        marks = [grade(images, prompts) for images in (exact, quantized)]
        row = {
            "backend": backend,
            "psnr_mean": mean_psnr(decibels),
            "psnr_worst": min(value for value in decibels if value is not None),
            "psnr_below_35": sum(value is not None and value < 35 for value in decibels) / len(prompts),
            "ssim_mean": float(np.mean([ssim(*pair) for pair in zip(exact, quantized, strict=True)])),
            "correct_fp32": sum(marks[0]) / len(prompts),
            "correct_int8": sum(marks[1]) / len(prompts),
            "seconds": time.perf_counter() - begun,
        }
        rows.append(row)
        names = ("psnr_mean", "psnr_worst", "ssim_mean", "correct_fp32", "correct_int8")
        table.add_row(backend, *(f"{row[name]:.4g}" for name in names))
    Console().print(table)
    shares = {name: part["int8_share"] for name, part in report["components"].items()}
    print({name: f"{share:.1%}" for name, share in shares.items()})
    if args.json:
        facts = {
            "prompts": len(prompts),
            "backends": rows,
            "int8_share": shares,
            "bytes": {side: report["summary"][f"bytes_{side}"] for side in ("fp32", "int8")},
            "record": report["record"]["sha256"],
            "machine": machine(),
            "tools": versions(),
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
