"""Measures the time from the start of `ldm-export generate` to the first image, in an environment without torch."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = "a large red circle in the center on a white background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument(
        "--python", default=sys.executable, help="Python of the environment, e.g. .venv-thin/bin/python"
    )
    parser.add_argument("--backend", nargs="+", default=["onnxruntime"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--phases", action="store_true", help="measure the phases of the process instead")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    if args.phases:
        write({"milliseconds": {backend: phases(args, backend) for backend in args.backend}}, args.json)
        return
    seconds: dict[str, list[float]] = {backend: [] for backend in args.backend}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            for backend, times in seconds.items():
                image = Path(folder, "first.png")
                command = [args.python, "-m", "ldm_export.cli", "generate", args.bundle, PROMPT, "-o", image]
                start = time.perf_counter()
                subprocess.run([*map(str, command), "--backend", backend, "--quiet"], check=True, capture_output=True)
                times.append(time.perf_counter() - start)
                image.unlink()
    rows = {backend: {"median": statistics.median(s), "least": min(s)} for backend, s in seconds.items()}
    write({"seconds": rows}, args.json)


def write(figures: dict[str, Any], file: Path | None) -> None:
    """Print the figures, and write them to a file if there is one."""
    facts = {"machine": platform.processor() or platform.machine(), "steps": 50, **figures}
    print(json.dumps(facts, indent=1))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=1) + "\n")


def phases(args: argparse.Namespace, backend: str) -> dict[str, float]:
    """Return median milliseconds by phase."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            script = [Path(__file__).with_name("first_image_phases.py"), repr(time.time()), args.bundle, backend]
            command = [args.python, *map(str, script), str(Path(folder, "first.png"))]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    return {phase: round(1e3 * statistics.median(one[phase] for one in found), 1) for phase in found[0]}


if __name__ == "__main__":
    main()
