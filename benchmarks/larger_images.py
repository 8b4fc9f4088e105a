"""Measures the memory that super-resolution needs by image size, and compares it with the logged estimate.

For each size, a process of its own samples two steps. The peak memory at the model's own size is subtracted, because it
is that of the program and the weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.required_memory import required_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of a super-resolution model")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96, 112], help="pixels of the images to enlarge")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return sample(args.bundle, args.side)
    model = Bundle.open(args.bundle).manifest.model
    own = model.components["decoder"].inputs[0].bounds("opt")[2]
    peaks = {side: measured(args.bundle, side) for side in (own, *args.sides)}
    figures = [
        {
            "side": side,
            "estimated_bytes": required_bytes(model, (1, model.latents.channels, side, side)),
            "measured_bytes": peaks[side] - peaks[own],
        }
        for side in args.sides
    ]
    for figure in figures:
        print(*figure.values())
    if args.json:
        args.json.write_text(json.dumps({"own_side": own, "figures": figures}, indent=2) + "\n")
    return 0


def measured(bundle: Path, side: int) -> int:
    """Peak resident memory in bytes of a process that enlarges one image."""
    command = [sys.executable, __file__, str(bundle), "--side", str(side)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def sample(bundle: Path, side: int) -> int:
    image = np.random.default_rng(0).random((1, 3, side, side), np.float32)
    with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", device="cpu") as pipeline:
        pipeline(image=image, seed=0, num_inference_steps=2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return 0


if __name__ == "__main__":
    sys.exit(main())
