"""Measures how the cost grows with batch, pixels and steps, fits exponents and draws a chart.

The script times the UNet and the decoder for each batch and size, and whole images for each number of steps. It also
counts the floating-point operations of a step with torch's FlopCounterMode on the torch module, without computing
them. If the exponent of the seconds is above that of the operations, time is wasted.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from ldm_export.bench.figures import machine, versions
from ldm_export.bench.worker_pool import Worker, rounds
from ldm_export.demo import demo_checkpoint
from ldm_export.page.chart import Series, lines, sheet
from ldm_runtime.errors import BackendError

TOKENS = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--checkpoint", type=Path, help="whose UNet is counted (default: the demo model)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 320, 384, 448, 512], help="pixels of a side")
    parser.add_argument(
        "--steps", type=int, nargs="*", default=[10, 20, 50, 100], help="of whole images; none to leave them out"
    )
    parser.add_argument("--corners", action="store_true", help="one size for all batches, one batch for all sizes")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("-o", "--output", type=Path, help="write a chart here, as SVG")
    args = parser.parse_args()
    settings = {"bundle": str(args.bundle), "backend": args.backend, "precision": args.precision}
    config = json.loads(((args.checkpoint or demo_checkpoint()) / "unet/config.json").read_text())
    facts: dict = {"machine": machine(), "tools": versions(), "bundle": args.bundle.resolve().name}
    command = [sys.executable, "-m", "ldm_export.bench.bundle_worker"]
    settings |= {"device": "cpu", "threads": None}
    facts |= {"grid": [], "steps": [], "refused": []}
    for size in args.sizes:  # one process per size, so that memory of one size does not affect the next
        with Worker("bench", command, settings) as one:
            facts["choice"] = one.facts["choice"]
            for batch in args.batches:
                if args.corners and args.batches[0] != batch and args.sizes[0] != size:
                    continue
                point = {"batch": batch, "size": size, "pixels": size * size}
                try:
                    for part in ("unet", "decoder"):
                        point[part] = seconds(one, part, batch, size, args.runs)
                except BackendError as error:  # larger batches of this size would fail too
                    facts["refused"].append(point | {"error": str(error)})
                    print(error, file=sys.stderr)
                    break
                facts["grid"].append(point | {"gflop": gigaflop(config, 2 * batch, size // 8)})
                print(point, file=sys.stderr)
    with Worker("bench", command, settings) as one:
        for steps in args.steps:
            facts["steps"].append({"steps": steps, "image": seconds(one, "image", 1, args.sizes[0], args.runs, steps)})
            print(facts["steps"][-1], file=sys.stderr)
    facts["exponents"] = exponents(facts)
    Console().print_json(data=facts["exponents"])
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    if args.output:
        args.output.write_text(chart(facts))


def seconds(worker: Worker, part: str, batch: int, size: int, runs: int, steps: int = 1) -> float:
    """Return the minimum of ``runs`` timings, because other load can only add to it."""
    command = {"what": part, "batch": batch, "steps": steps, "guidance": 6.0, "eta": 0.0, "seed": 0}
    (answers,) = rounds([worker], lambda number: {**command, "height": size, "width": size}, runs)
    return min(answer["seconds"] for answer in answers)


def gigaflop(config: dict, rows: int, side: int) -> dict[str, float]:
    """Return 10⁹ operations of a UNet call: all, and those of the products of attention."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).eval()
        sample, context = torch.empty(rows, unet.config.in_channels, side, side), unet.config.cross_attention_dim
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            unet(sample, torch.ones(rows, dtype=torch.long), torch.empty(rows, TOKENS, context))
    counts = counter.get_flop_counts()["Global"]
    attention = sum(
        count for operation, count in counts.items() if "bmm" in str(operation) or "attention" in str(operation)
    )
    return {"all": sum(counts.values()) / 1e9, "attention": attention / 1e9}


def exponents(facts: dict) -> dict[str, dict[str, float]]:
    """Return exponents over batch at the smallest size, over pixels at the smallest batch, and over steps."""
    grid = facts["grid"]
    first = {name: min(point[name] for point in grid) for name in ("batch", "size")}
    along = {
        "batch": [point for point in grid if point["size"] == first["size"]],
        "pixels": [point for point in grid if point["batch"] == first["batch"]],
    }
    slopes: dict[str, dict[str, float]] = {}
    for axis, points in along.items():
        values = [point[axis] for point in points]
        if len(values) > 1:
            slopes[axis] = {part: slope(values, [point[part] for point in points]) for part in ("unet", "decoder")}
            slopes[axis]["operations"] = slope(values, [point["gflop"]["all"] for point in points])
    if len(facts["steps"]) > 1:
        steps = [point["steps"] for point in facts["steps"]]
        slopes["steps"] = {"image": slope(steps, [point["image"] for point in facts["steps"]])}
    return slopes


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the exponent e of y ∝ xᵉ, by least squares."""
    return float(np.polyfit([math.log(value) for value in x], [math.log(value) for value in y], 1)[0])


def chart(facts: dict) -> str:
    """Return an SVG of seconds: a step by batch and size, per image and megapixel, and whole images by steps."""
    grid, sizes = facts["grid"], sorted({point["size"] for point in facts["grid"]})
    by_size = [
        Series(f"{size}×{size}", tuple((p["batch"], p["unet"]) for p in grid if p["size"] == size)) for size in sizes
    ]
    batches = sorted({point["batch"] for point in grid})
    per_pixel = [
        Series(
            f"batch {batch}",
            tuple((p["size"], p["unet"] / batch / p["pixels"] * 1e6) for p in grid if p["batch"] == batch),
        )
        for batch in batches
    ]
    name, both = facts["bundle"], (True, True)
    charts = [
        lines(f"{name}: one guided step", "images in a call", "seconds", by_size, log=both),
        lines(f"{name}: one guided step, per image and megapixel", "pixels of a side", "seconds", per_pixel),
    ]
    if facts["steps"]:
        steps = Series(f"{sizes[0]}×{sizes[0]}", tuple((p["steps"], p["image"]) for p in facts["steps"]))
        charts.append(lines(f"{name}: an image", "steps", "seconds", [steps], log=both))
    return sheet(charts)


if __name__ == "__main__":
    main()
