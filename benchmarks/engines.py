"""Measures time and peak memory of building each TensorRT for RTX engine of a model.

The script runs `ldm-export build` in a process of its own, with random weights for a folder of config files. It keeps
finished graphs of an existing bundle. It exits with 1 if an engine takes longer than --seconds, or if the peak memory
of its build exceeds 1.3 × the component's float32 weights + 3 GB.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

from export_full_size import BASE, FACTOR, INTERVAL, component_bytes
from rich.console import Console
from rich.table import Table

TOOLS = ("tensorrt-rtx", "onnx", "onnx-ir", "onnxruntime")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, metavar="FOLDER", help="a checkpoint's config files")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the bundle to write")
    parser.add_argument("--precision", default="fp16", help="precision of the engines (default fp16)")
    parser.add_argument("--compute-capability", default="8.9", metavar="LIST", help="of the GPUs (default 8.9)")
    parser.add_argument("--seconds", type=float, default=60, help="time limit for one engine (default 60)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="for the ranges (default: those of build)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    options = ["--precision", args.precision, "--target", "tensorrt-rtx", "--random-weights", "--quiet"]
    options += [] if args.prompts is None else ["--prompts", str(args.prompts)]
    command = ["build", str(args.configs), "-o", str(args.output), "--compute-capability", args.compute_capability]
    work = args.output.resolve().parent / f".{args.output.name}.part"
    code, peaks = run([sys.executable, "-m", "ldm_export.cli", *command, *options], work)
    if code:
        return code
    stages = json.loads((args.output / "build-log.json").read_text())["stages"]
    weights = component_bytes(args.output)
    engines = {}
    for file in sorted(args.output.glob(f"*/{args.precision}.tensorrt-rtx*.engine")):
        component, stage = file.parent.name, f"{file.parent.name}.{file.stem}"
        bound = FACTOR * weights[component] + BASE
        engines[component] = {
            "seconds": stages[stage]["seconds"],
            "bytes": file.stat().st_size,
            "fp32_bytes": weights[component],
            "peak_bytes": peaks.get(stage, 0),
            "bound_bytes": round(bound),
            "matrix_work": json.loads(file.with_name(f"{file.name}.json").read_text())["proof"]["matrix_work"],
            "within_bounds": stages[stage]["seconds"] <= args.seconds and 0 < peaks.get(stage, 0) <= bound,
        }
    facts = {
        "machine": platform.processor() or platform.machine(),
        "tools": {name: version(name) for name in TOOLS},
        "precision": args.precision,
        "compute_capability": args.compute_capability,
        "prompts": None if args.prompts is None else len(args.prompts.read_text().splitlines()),
        "engines": engines,
        "stages": {
            name: {**stage, "peak_bytes": peaks.get(name, 0)} for name, stage in stages.items() if name not in engines
        },
    }
    show(facts)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0 if all(engine["within_bounds"] for engine in engines.values()) else 1


def run(command: list[str], work: Path) -> tuple[int, dict[str, int]]:
    """Run a build and return its exit code and the peak resident bytes of each stage."""
    process, peaks, ended = subprocess.Popen(command), dict[str, int](), threading.Event()
    sampler = threading.Thread(target=sample, args=(process.pid, work, peaks, ended))
    sampler.start()
    try:
        return process.wait(), peaks
    finally:
        ended.set()
        sampler.join()


def sample(pid: int, work: Path, peaks: dict[str, int], ended: threading.Event) -> None:
    """Update the peak of the current stage, which its folder in the work folder identifies; child processes count."""
    while not ended.is_set():
        making = [path.name.removeprefix(".").removesuffix(".making") for path in work.glob(".*.making")]
        total = resident(pid) + sum(map(resident, children(pid)))
        for name in making:
            peaks[name] = max(peaks.get(name, 0), total)
        time.sleep(INTERVAL)


def children(pid: int) -> list[int]:
    """Return the child processes of a process; see proc_pid_task_children(5)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def resident(pid: int) -> int:
    """Return the resident bytes of a process, 0 if it has ended; see proc_pid_status(5)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = dict(line.split(":", 1) for line in text.splitlines())
    return int(lines.get("VmRSS", "0 kB").split()[0]) * 1024


def show(facts: dict) -> None:
    table = Table("engine", "seconds", "GB", "fp32 GB", "peak GB", "bound GB", "matrix work", "")
    for name, engine in facts["engines"].items():
        sizes = (f"{engine[key] / 1e9:.2f}" for key in ("bytes", "fp32_bytes", "peak_bytes", "bound_bytes"))
        work = ", ".join(f"{count} {kind}" for kind, count in engine["matrix_work"].items())
        verdict = "within" if engine["within_bounds"] else "beyond"
        table.add_row(name, f"{engine['seconds']:.1f}", *sizes, work, verdict)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
