"""Tries many inputs of every kind, each kind in a process of its own: ``python -m tests.fuzz.campaign``.

A process that crashes is an input that failed; the next process goes on after it. Results are added to a JSON file, so
that a campaign may be run in parts. Each input is determined by its kind and its number.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fuzz.outcome import Attempt, Counts, try_inputs

__all__ = ["INPUTS", "prepared"]

INPUTS = {
    "manifests": 16_000,
    "configs": 6_000,
    "tokenizers": 13_000,
    "safetensors": 10_000,
    "bin": 16_000,
    "graphs": 2_000,
    "records": 3_000,
    "requests": 30_000,
    "answers": 6_000,
    "bodies": 3_000,
}
"""Kind -> number of inputs of a whole campaign."""
SECONDS = 60.0
"""Time after which a process ends and the next kind is tried."""
MEMORY = 12 * 2**30
"""Bytes of address space of a process; libraries reserve several GiB that they do not use."""


def prepared(kind: str, folder: Path) -> Attempt:
    """Prepare the inputs of a kind in a new folder."""
    attempt: Attempt = importlib.import_module(f"tests.fuzz.kinds.{kind}").prepare(folder)
    return attempt


def main() -> int:
    """Run the campaign. Returns 1 if an input failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=INPUTS, default=list(INPUTS), metavar="KIND")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--json", type=Path, required=True, help="results; those in the file are continued")
    parser.add_argument("--part", nargs=2, metavar=("KIND", "FIRST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        kind, first = args.part
        return _part(kind, int(first), args.seconds, args.json)
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    until = time.monotonic() + args.seconds
    while unfinished := [kind for kind in args.kinds if _tried(results, kind) < INPUTS[kind]]:
        # the kind that is furthest behind, so that a part of a campaign has tried all
        kind = min(unfinished, key=lambda kind: _tried(results, kind) / INPUTS[kind])
        if (left := until - time.monotonic()) <= 0:
            break
        _add(results, kind, _in_process(kind, _tried(results, kind), min(SECONDS, left)))
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    for kind, counts in results.items():
        print(f"{kind}: {counts['tried']} tried, {counts['accepted']} accepted, {len(counts['failures'])} failed")
    return int(any(counts["failures"] for counts in results.values()))


def _tried(results: dict[str, Any], kind: str) -> int:
    return int(results.get(kind, {}).get("tried", 0))


def _add(results: dict[str, Any], kind: str, counts: Counts) -> None:
    before = results.get(kind, {"tried": 0, "accepted": 0, "refused": 0, "failures": []})
    results[kind] = {
        "tried": before["tried"] + counts.tried,
        "accepted": before["accepted"] + counts.accepted,
        "refused": before["refused"] + counts.refused,
        "failures": before["failures"] + counts.failures,
    }


def _in_process(kind: str, first: int, seconds: float) -> Counts:
    """Try the inputs from a number on in a process of its own, up to the first that makes it crash."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        progress = Path(folder) / "progress"
        command = [sys.executable, "-m", "tests.fuzz.campaign", "--part", kind, str(first), "--seconds", str(seconds)]
        done = subprocess.run([*command, "--json", str(progress)], stdout=subprocess.DEVNULL)
        lines = progress.read_text().splitlines() if progress.exists() else []
        counts = Counts()
        for number, line in enumerate(lines, first):
            counts.add(number, json.loads(line))
        if done.returncode:
            counts.add(first + len(lines), f"the process ended with {done.returncode}")
        return counts


def _part(kind: str, first: int, seconds: float, progress: Path) -> int:
    """Try at least one input, and write the result of each as a line."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder, progress.open("a") as lines:
        attempt = prepared(kind, Path(folder))
        if kind != "bodies":  # its server has processes of its own
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        until = time.monotonic() + seconds
        for number in range(first, INPUTS[kind]):
            counts = try_inputs(attempt, number, 1)
            result = "accepted" if counts.accepted else "refused" if counts.refused else counts.failures[0]
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            if time.monotonic() > until:
                break
    if kind != "bodies":  # whose server is stopped at the end
        os._exit(0)  # without waiting for threads that an input left behind
    return 0


if __name__ == "__main__":
    sys.exit(main())
