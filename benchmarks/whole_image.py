"""Measures how a whole image spends its time on a CPU: components, their operators, and work outside of engines.

Each component is timed while images are generated. The engine's own counters, for the inputs of a component's first
call, give the shares of its operators; they are scaled to the time of all its calls.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from operators import onnxruntime, openvino
from rich.console import Console
from rich.table import Table

from ldm_export.bench.figures import machine, versions
from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.bundle_layout import CPU_VARIANT

PROMPT = "a large red circle in the center on a white background"
CALLS = 20
"""Calls of each component whose operators are timed."""
LEAST = 0.01
"""Operators that take a smaller share of an image have no row of their own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--backend", choices=("onnxruntime", "openvino"), default="openvino")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cache-every", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=int, default=7, help="images; the medians are shown (default 7)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    with LatentDiffusionPipeline.from_bundle(
        bundle, precision=args.precision, backend=args.backend, threads=args.threads
    ) as pipeline:
        assert pipeline.choice is not None
        arithmetic = pipeline.choice.arithmetic
        seconds, calls, feeds = timed(
            pipeline, args.runs, {"num_inference_steps": args.steps, "cache_every": args.cache_every}
        )
    rows = []
    for name, spent in seconds.items():
        if name not in feeds:
            rows.append({"component": name, "calls": 1, "operator": "", "ms": 1e3 * spent})
            continue
        variant = CPU_VARIANT if args.backend == "onnxruntime" else ""
        graph = str(bundle.graph(name, pipeline.choice.graph, variant))
        if args.backend == "openvino":
            kinds, _ = openvino(graph, feeds[name], {"fp32": "f32"}.get(arithmetic, arithmetic), CALLS, args.threads)
        else:
            kinds, _ = onnxruntime(graph, feeds[name], CALLS, args.threads)
        within = sum(kinds.values())
        for kind, part in kinds.most_common():
            row = {"component": name, "calls": calls[name], "operator": kind, "ms": 1e3 * spent * part / within}
            rows.append(row)
    total = sum(row["ms"] for row in rows)
    show(rows, total)
    if args.json:
        facts = {"machine": machine(), "tools": versions(), "backend": args.backend, "arithmetic": arithmetic}
        options = {"steps": args.steps, "cache_every": args.cache_every, "threads": args.threads}
        args.json.write_text(json.dumps({**facts, **options, "ms": total, "rows": rows}, indent=1) + "\n")


def timed(
    pipeline: LatentDiffusionPipeline, runs: int, options: dict[str, Any]
) -> tuple[dict[str, float], Counter[str], dict[str, dict[str, np.ndarray]]]:
    """Generate images; return median seconds by component, with the rest as "outside", calls, and first inputs."""
    spent, calls, feeds = Counter[str](), Counter[str](), {}

    def run(name: str, original: Any, feed: dict[str, np.ndarray]) -> Any:
        started = time.perf_counter()
        result = original(feed)
        spent[name] += time.perf_counter() - started  # type: ignore[assignment]
        calls[name] += 1
        feeds.setdefault(name, {key: np.array(value) for key, value in feed.items()})
        return result

    for name, backend in pipeline.backends.items():
        backend.run = partial(run, name, backend.run)  # type: ignore[method-assign]
    images: list[dict[str, float]] = []
    for seed in range(runs + 1):
        spent.clear()
        calls.clear()
        started = time.perf_counter()
        _ = pipeline(f"{PROMPT} {seed}", seed=seed, **options).images  # a prompt whose states are not cached
        whole = time.perf_counter() - started
        images.append({**spent, "outside of engines": whole - sum(spent.values())})
    names = images[-1]
    return {name: float(np.median([one[name] for one in images[1:]])) for name in names}, calls, feeds


def show(rows: list[dict[str, Any]], total: float) -> None:
    """Print components and the operators that take a noticeable share; the others of a component are added up."""
    table = Table("component", "calls", "operator", "ms", "share", title=f"{total:.0f} ms an image")
    for name in dict.fromkeys(row["component"] for row in rows):
        own = [row for row in rows if row["component"] == name]
        spent = sum(row["ms"] for row in own)
        table.add_row(name, str(own[0]["calls"]), "", f"{spent:.1f}", f"{spent / total:.1%}", style="bold")
        listed = [row for row in own if row["operator"] and row["ms"] >= LEAST * total]
        for row in listed:
            table.add_row("", "", row["operator"], f"{row['ms']:.1f}", f"{row['ms'] / total:.1%}")
        if listed and (rest := spent - sum(row["ms"] for row in listed)) > 0:
            table.add_row("", "", "others", f"{rest:.1f}", f"{rest / total:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
