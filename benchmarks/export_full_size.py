"""Measures the time of each stage and the peak memory of exporting a model.

The script runs `ldm-export build` in a process of its own, with random weights for a folder of config files. It exits
with 1 if the peak exceeds 1.3 × the float32 weights of the largest component + 3 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

from ldm_runtime import Bundle
from ldm_runtime.bundle_layout import files_of_graph

FACTOR, BASE = 1.3, 3e9
INTERVAL = 0.02  # seconds between two samples
TOOLS = ("torch", "diffusers", "onnx", "onnxscript", "onnx-ir")


@dataclass
class Peak:
    """CPU seconds of a process and its peak resident bytes, counted by the kernel, and by kind from samples."""

    resident: int = 0
    cpu_seconds: float = 0.0
    sampled: dict[str, int] = field(default_factory=lambda: {"VmRSS": 0, "RssAnon": 0, "RssFile": 0})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, metavar="FOLDER", help="a checkpoint's config files")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the bundle to write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    work = args.output.parent / f".{args.output.name}.part"
    for folder in (args.output, work):
        if folder.exists():  # stages of an earlier build would not be measured
            parser.error(f"{folder} exists; remove it, or choose another --output")
    command = ["build", str(args.configs), "--random-weights", "-o", str(args.output), "--quiet"]
    begun = time.monotonic()
    code, peak = run([sys.executable, "-m", "ldm_export.cli", *command])
    if code:
        return code
    stages = json.loads((args.output / "build-log.json").read_text())["stages"]
    weights = component_bytes(args.output)
    bound = FACTOR * max(weights.values()) + BASE
    facts = {
        "machine": platform.processor() or platform.machine(),
        "tools": {name: version(name) for name in TOOLS},
        "seconds": {"all": round(time.monotonic() - begun, 1), **{name: s["seconds"] for name, s in stages.items()}},
        "component_bytes": weights,
        "peak_bytes": {"resident": peak.resident, **peak.sampled},
        "bound_bytes": round(bound),
        "within_bound": peak.resident <= bound,
    }
    show(facts)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0 if facts["within_bound"] else 1


def run(command: list[str], output: IO[str] | None = None) -> tuple[int, Peak]:
    """Run a command, which writes to ``output``, and return its exit code and its peak memory."""
    process, peak, ended = subprocess.Popen(command, stdout=output), Peak(), threading.Event()
    sampler = threading.Thread(target=sample, args=(process.pid, peak, ended))
    sampler.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    finally:
        ended.set()
        sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    peak.resident = max(usage.ru_maxrss * 1024, peak.sampled["VmRSS"])  # getrusage(2): kilobytes, and may lag a little
    peak.cpu_seconds = usage.ru_utime + usage.ru_stime
    return abs(process.returncode), peak


def sample(pid: int, peak: Peak, ended: threading.Event) -> None:
    """Update the sampled peaks from /proc/PID/status until ``ended``; see proc_pid_status(5)."""
    status = Path(f"/proc/{pid}/status")
    while not ended.wait(INTERVAL):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except (FileNotFoundError, ProcessLookupError):
            return
        for name in peak.sampled:
            kilobytes = int(lines.get(name, "0 kB").split()[0])  # a process that has ended has no such line
            peak.sampled[name] = max(peak.sampled[name], kilobytes * 1024)


def component_bytes(bundle: Path) -> dict[str, int]:
    """Return component -> bytes of its float32 graph and of the external weights that the graph refers to."""
    manifest = Bundle.open(bundle).manifest
    graphs = {name: part.graphs["fp32"] for name, part in manifest.components.items() if "fp32" in part.graphs}
    return {
        name: sum(manifest.files[file].size for file in files_of_graph(graph, manifest.files))
        for name, graph in graphs.items()
    }


def show(facts: dict) -> None:
    table = Table("stage", "seconds", "GB")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds in facts["seconds"].items():
        size = facts["component_bytes"].get(name.removesuffix(".fp32"))
        table.add_row(name, f"{seconds:.1f}", f"{size / 1e9:.2f}" if size else "")
    table.add_section()
    peaks = facts["peak_bytes"]
    table.add_row("peak resident memory", "", f"{peaks['resident'] / 1e9:.2f}")
    table.add_row("  of it anonymous, sampled", "", f"{peaks['RssAnon'] / 1e9:.2f}")
    table.add_row("  of it mapped files, sampled", "", f"{peaks['RssFile'] / 1e9:.2f}")
    table.add_row(f"bound: {FACTOR} × largest + {BASE / 1e9:g} GB", "", f"{facts['bound_bytes'] / 1e9:.2f}")
    console = Console()
    console.print(table)
    console.print(f"peak memory is {'within' if facts['within_bound'] else 'above'} the limit")


if __name__ == "__main__":
    sys.exit(main())
