"""Measures how much time feature caching saves, and how it changes the images of the demo model.

For each setting the script measures the seconds for an image and the PSNR against the image without caching, in the
first precision. All settings of a bundle alternate, image by image. Give one bundle for each number of layers in the
shallow UNet (``build --feature-cache``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_export_demo.grader import grade
from ldm_export_demo.grammar import held_out_prompts, parse
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from ldm_runtime.images import psnr
from ldm_runtime.model import SHALLOW_UNET, UNET
from ldm_runtime.specs import dummy_inputs

SETTINGS = (
    (1, 0, 1),
    *((2, full, 1) for full in (0, 5)),
    *((every, full, 1) for every in (3, 5) for full in (0, 5, 10)),
    (1, 0, 3),
    (3, 5, 3),
    (5, 5, 2),
)
"""Values of cache_every, full_steps and guidance_every. The first setting is the reference."""
OPTIONS: dict[str, Any] = {"eta": 0.3, "guidance_scale": 6.0, "num_inference_steps": 50}
CALLS = 20
"""Timed calls of the UNet and of the shallow UNet, which alternate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, nargs="+", default=[Path("build/shapes")])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--precision", nargs="+", default=["fp32"], metavar="NAME", help="default: fp32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundles = [measure(Bundle.open(path), args.images, args.precision) for path in args.bundle]
    for bundle in bundles:
        names = ("precision", "cache_every", "full_steps", "guidance_every")
        table = Table(*names, "faster", "PSNR dB: mean", "worst", "correct")
        for row in bundle["rows"]:
            decibels = ("–" if row[key] is None else f"{row[key]:.1f}" for key in ("mean_psnr", "worst_psnr"))
            table.add_row(
                *(str(row[name]) for name in names), f"{row['faster']:.2f}", *decibels, f"{row['correct']:.0%}"
            )
        layers, cost = bundle["layers"], bundle["cost_of_shallow_call"]
        Console().print(f"{layers} layers in the shallow UNet, whose call takes {cost:.2f} of the UNet's", table)
    if args.json:
        document = {"images": args.images, **OPTIONS, "tools": {"openvino": version("openvino")}, "bundles": bundles}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


def measure(bundle: Bundle, images: int, precisions: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a bundle."""
    prompts = held_out_prompts(images // 2, images - images // 2)
    settings = [(precision, *setting) for precision in precisions for setting in SETTINGS]
    seconds: list[list[float]] = [[] for _ in settings]
    found: list[list[np.ndarray]] = [[] for _ in settings]
    with ExitStack() as stack:
        pipelines = {
            name: stack.enter_context(LatentDiffusionPipeline.from_bundle(bundle, precision=name, backend="openvino"))
            for name in precisions
        }
        cost = cost_of_shallow_call(pipelines[precisions[0]])
        for seed, prompt in enumerate(track(prompts, bundle.folder.name, console=Console(stderr=True))):
            for number, (precision, every, full, guidance) in enumerate(settings):
                options = OPTIONS | {"cache_every": every, "full_steps": full, "guidance_every": guidance}
                started = time.perf_counter()
                (image,) = pipelines[precision](prompt, seed=seed, **options).images
                seconds[number].append(time.perf_counter() - started)
                found[number].append(np.asarray(image))
    rows = []
    for (precision, every, full, guidance), times, own in zip(settings, seconds, found, strict=True):
        pairs = zip(own, found[0], strict=True)
        decibels = [one for one in (psnr(a.astype(float), b.astype(float), 255.0) for a, b in pairs) if one is not None]
        correct = [grade(image, parse(text)).correct for image, text in zip(own, prompts, strict=True)]
        rows.append(
            {
                "precision": precision,
                "cache_every": every,
                "full_steps": full,
                "guidance_every": guidance,
                "faster": float(np.median(np.divide(seconds[0], times))),
                "seconds": float(np.median(times)),
                "mean_psnr": float(np.mean(decibels)) if decibels else None,
                "worst_psnr": float(np.min(decibels)) if decibels else None,
                "correct": float(np.mean(correct)),
            }
        )
    layers = bundle.manifest.request["feature_cache"]
    return {"layers": layers, "cost_of_shallow_call": cost, "rows": rows}


def cost_of_shallow_call(pipeline: LatentDiffusionPipeline) -> float:
    """Return the time of a call of the shallow UNet as a share of the UNet's, for one guided image."""
    pipeline("a red circle", **OPTIONS | {"num_inference_steps": 4, "cache_every": 2, "full_steps": 0})
    plan = pipeline.plan(Request("a red circle", **OPTIONS))
    times: dict[str, list[float]] = {UNET: [], SHALLOW_UNET: []}
    for call in range(CALLS):
        for name, taken in times.items():
            feed = dummy_inputs(pipeline.model.components[name], "opt", seed=call)
            assert len(feed["sample"]) == plan.rows
            started = time.perf_counter()
            pipeline.backends[name].run(feed)
            taken.append(time.perf_counter() - started)
    return float(np.median(np.divide(times[SHALLOW_UNET], times[UNET])))


if __name__ == "__main__":
    main()
