"""Measures how schedulers, numbers of steps and eta change the time and the images of the demo model.

The script measures the seconds of an image, the PSNR against the images of DDIM with 50 steps and eta 0, and the share
of images that show what the prompt says. All settings alternate, image by image.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_export_demo.grader import grade
from ldm_export_demo.grammar import held_out_prompts, parse
from ldm_runtime import Bundle, LatentDiffusionPipeline, LdmError, Request
from ldm_runtime.images import psnr
from ldm_runtime.schedulers import SCHEDULERS

STEPS = (50, 30, 20, 10, 5)
ETAS = {"DDIMScheduler": (0.0, 1.0), "TCDScheduler": (0.0, 1.0)}
"""Values of eta by scheduler; the others have none. The first of all settings is the reference."""
GUIDANCE_SCALE = 6.0


@dataclass(frozen=True)
class Setting:
    """Fields of a request; ``eta`` is None for schedulers that have none."""

    scheduler: str
    eta: float | None
    steps: int

    @property
    def options(self) -> dict[str, Any]:
        """The fields as the pipeline takes them."""
        options = {"scheduler": self.scheduler, "num_inference_steps": self.steps, "guidance_scale": GUIDANCE_SCALE}
        return options | ({} if self.eta is None else {"eta": self.eta})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundle, prompts = Bundle.open(args.bundle), held_out_prompts(args.images // 2, args.images - args.images // 2)
    with LatentDiffusionPipeline.from_bundle(
        bundle, precision="fp32", backend=args.backend, threads=args.threads
    ) as pipeline:
        settings, refused = accepted(pipeline)
        rows = measure(pipeline, settings, prompts)
    table = Table("scheduler", "eta", "steps", "time", "PSNR dB: mean", "worst", "correct")
    for row in rows:
        eta = "" if row["eta"] is None else f"{row['eta']:g}"
        decibels = ("–" if row[key] is None else f"{row[key]:.1f}" for key in ("mean_psnr", "worst_psnr"))
        table.add_row(
            row["scheduler"], eta, str(row["steps"]), f"{row['time']:.2f}", *decibels, f"{row['correct']:.0%}"
        )
    Console().print(table)
    for name, why in refused.items():
        Console(stderr=True).print(f"refused: {name}: {why}", markup=False)
    if args.json:
        tools = {args.backend: version(args.backend)}
        document = {"images": args.images, "guidance_scale": GUIDANCE_SCALE, "threads": args.threads, "tools": tools}
        args.json.write_text(json.dumps({**document, "refused": refused, "rows": rows}, indent=1) + "\n")


def accepted(pipeline: LatentDiffusionPipeline) -> tuple[list[Setting], dict[str, str]]:
    """Return the settings that the model takes, and the schedulers that it refuses with the reason."""
    settings: list[Setting] = []
    refused: dict[str, str] = {}
    for scheduler in SCHEDULERS:
        own = [Setting(scheduler, eta, steps) for eta in ETAS.get(scheduler, (None,)) for steps in STEPS]
        try:
            for setting in own:
                pipeline.plan(Request("a red circle", **setting.options))
        except LdmError as error:
            refused[scheduler] = str(error)
        else:
            settings += own
    return settings, refused


def measure(pipeline: LatentDiffusionPipeline, settings: list[Setting], prompts: list[str]) -> list[dict[str, Any]]:
    """Return the figures of each setting; the first is the reference."""
    seconds: list[list[float]] = [[] for _ in settings]
    found: list[list[np.ndarray]] = [[] for _ in settings]
    pipeline("a red circle", num_inference_steps=4)
    for seed, prompt in enumerate(track(prompts, "images", console=Console(stderr=True))):
        for number, setting in enumerate(settings):
            started = time.perf_counter()
            (image,) = pipeline(prompt, seed=seed, **setting.options).images
            seconds[number].append(time.perf_counter() - started)
            found[number].append(np.asarray(image))
    rows = []
    for setting, times, own in zip(settings, seconds, found, strict=True):
        pairs = zip(own, found[0], strict=True)
        decibels = [one for one in (psnr(a.astype(float), b.astype(float), 255.0) for a, b in pairs) if one is not None]
        correct = [grade(image, parse(text)).correct for image, text in zip(own, prompts, strict=True)]
        rows.append(
            {
                **asdict(setting),
                "time": float(np.median(np.divide(times, seconds[0]))),
                "seconds": float(np.median(times)),
                "mean_psnr": float(np.mean(decibels)) if decibels else None,
                "worst_psnr": float(np.min(decibels)) if decibels else None,
                "correct": float(np.mean(correct)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
