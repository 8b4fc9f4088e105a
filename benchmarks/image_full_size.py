"""Time and peak memory of one guided image of a large model, through the command line in its own process.

    python benchmarks/image_full_size.py /tmp/bundle --steps 20
    python benchmarks/image_full_size.py /tmp/bundle --steps 4 --size 1024

Seconds include the start of the process and the loading of the graphs; a run with fewer steps gives the seconds of a
step. CPU seconds, of all threads, depend less on other work of the machine. With random weights the image has no
meaning, but takes as long as that of a trained model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from export_full_size import run
from PIL import Image
from rich.console import Console
from rich.table import Table

from ldm_export.bench.figures import machine, versions
from ldm_runtime import Bundle

PROMPT, SEED = "a painting of a squirrel eating a burger", 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fewer-steps", type=int, default=2, help="of the second run (default 2)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="height and width (default: the model's)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="OPTION", help="of generate, e.g. --option=--backend=openvino"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the figures to those in this file")
    args = parser.parse_args()
    shape = [] if args.size is None else ["--height", str(args.size), "--width", str(args.size)]
    runs = {
        steps: generate(args.bundle, [*shape, *args.option, "--steps", str(steps)])
        for steps in (args.fewer_steps, args.steps)
    }
    fewer, whole = runs[args.fewer_steps], runs[args.steps]
    manifest = Bundle.open(args.bundle).manifest
    facts = {
        "bundle": args.bundle.absolute().name,
        "scheduler": manifest.scheduler["class"],
        "options": args.option,
        "steps": args.steps,
        **whole,
        "fewer_steps": {"steps": args.fewer_steps, "seconds": fewer["seconds"], "cpu_seconds": fewer["cpu_seconds"]},
        "step_seconds": round((whole["seconds"] - fewer["seconds"]) / (args.steps - args.fewer_steps), 2),
        "step_cpu_seconds": round((whole["cpu_seconds"] - fewer["cpu_seconds"]) / (args.steps - args.fewer_steps), 2),
        "machine": machine(),
        "tools": versions(),
    }
    show(facts)
    if args.json:
        kept = json.loads(args.json.read_text()) if args.json.exists() else []
        same = ("bundle", "options", "steps", "pixels")
        kept = [one for one in kept if any(one[name] != facts[name] for name in same)]
        args.json.write_text(json.dumps([*kept, facts], indent=1) + "\n")
    return 0


def generate(bundle: Path, options: list[str]) -> dict[str, Any]:
    """Generate an image in a process of its own; return its size, seconds, peak resident bytes and engine."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "image.png"
        command = [sys.executable, "-m", "ldm_export.cli", "generate", str(bundle), PROMPT, "--seed", str(SEED)]
        begun = time.monotonic()
        with (Path(folder) / "result.json").open("w") as result:
            code, peak = run([*command, *options, "-o", str(file), "--json"], result)
        seconds = time.monotonic() - begun
        if code:
            sys.exit(code)
        pixels = np.asarray(Image.open(file)).shape[:2]
        choice = json.loads((Path(folder) / "result.json").read_text())["choice"]
    return {
        "pixels": list(pixels),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(peak.cpu_seconds, 1),
        "peak_bytes": peak.resident,
        "choice": choice,
    }


def show(facts: dict[str, Any]) -> None:
    table = Table("bundle", "pixels", "steps", "seconds", "of a step", "CPU seconds", "of a step", "peak GB")
    seconds = [facts[name] for name in ("seconds", "step_seconds", "cpu_seconds", "step_cpu_seconds")]
    numbers = (facts["steps"], *seconds, f"{facts['peak_bytes'] / 1e9:.2f}")
    table.add_row(facts["bundle"], " × ".join(map(str, facts["pixels"])), *map(str, numbers))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
