"""Measures how far a bundle's images differ from those of diffusers, for several settings, seeds and batch sizes.

The script uses the demo model. It reports the largest difference of any pixel value, and the share of values that
differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_export.demo import demo_checkpoint
from ldm_export_demo.grammar import held_out_prompts
from ldm_runtime import LatentDiffusionPipeline

ETAS, GUIDANCES, STEPS = (0.0, 0.3), (1.0, 6.0), (1, 7, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    theirs = DiffusionPipeline.from_pretrained(demo_checkpoint())
    theirs.set_progress_bar_config(disable=True)
    settings = list(itertools.product(ETAS, GUIDANCES, STEPS))
    rows = []
    with LatentDiffusionPipeline.from_bundle(args.bundle, precision="fp32") as ours:
        for eta, guidance, steps in track(settings, console=Console(stderr=True)):
            worst, differing, count = 0, 0, 0
            for seed, batch in itertools.product(range(args.seeds), args.batches):
                prompts = held_out_prompts(0, batch, seed)
                options = {"eta": eta, "guidance_scale": guidance, "num_inference_steps": steps}
                mine = ours(prompts, seed=seed, **options).images
                reference = theirs(prompts, generator=torch.manual_seed(seed), **options).images
                for pair in zip(mine, reference, strict=True):
                    one, other = (np.asarray(image).astype(int) for image in pair)
                    worst = max(worst, int(np.abs(one - other).max()))
                    differing, count = differing + int((one != other).sum()), count + one.size
            rows.append({"eta": eta, "guidance": guidance, "steps": steps, "max": worst, "share": differing / count})
    table = Table("eta", "guidance", "steps", "largest difference", "values that differ")
    for row in rows:
        setting = (f"{row[name]:g}" for name in ("eta", "guidance", "steps"))
        table.add_row(*setting, f"{row['max']}/255", f"{row['share']:.5%}")
    Console().print(table)
    if args.json:
        tools = {name: version(name) for name in ("torch", "diffusers", "onnxruntime", "numpy")}
        images = args.seeds * sum(args.batches)
        facts = {"machine": platform.processor() or platform.machine(), "tools": tools, "images": images}
        facts["rows"] = rows
        args.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
