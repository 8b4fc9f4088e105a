"""Measures the time of one guided UNet step by kind of operator, with the counters of ONNX Runtime or OpenVINO.

The graph is the one that the engine runs. For ONNX Runtime this is the variant of the fp32 UNet with fused attention.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ldm_export.bench.figures import machine, versions
from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CPU_VARIANT
from ldm_runtime.specs import dummy_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--engine", choices=("onnxruntime", "openvino"), default="openvino")
    parser.add_argument("--precision", default="fp32", help="precision of the graph (default fp32)")
    parser.add_argument("--arithmetic", choices=("f32", "bf16"), default="bf16", help="of OpenVINO (default bf16)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    variant = CPU_VARIANT if args.engine == "onnxruntime" else ""
    graph = str(bundle.graph("unet", args.precision, variant))
    feed = dummy_inputs(bundle.manifest.components["unet"].spec)
    feed = {name: np.concatenate([array[:1]] * 2) for name, array in feed.items()}
    if args.engine == "openvino":
        milliseconds, counts = openvino(graph, feed, args.arithmetic, args.runs)
    else:
        milliseconds, counts = onnxruntime(graph, feed, args.runs)
    total = sum(milliseconds.values())
    table = Table("operation", "number", "ms", "share", title=f"{args.bundle.absolute().name}: {total:.1f} ms a step")
    rows = []
    for kind, spent in milliseconds.most_common():
        rows.append({"operation": kind, "number": counts[kind], "ms": spent, "share": spent / total})
        if spent / total >= 0.005:
            table.add_row(kind, str(counts[kind]), f"{spent:.1f}", f"{spent / total:.1%}")
    Console().print(table)
    if args.json:
        arithmetic = args.arithmetic if args.engine == "openvino" else args.precision
        facts = {"machine": machine(), "tools": versions(), "engine": args.engine, "component": "unet"}
        facts |= {"graph": args.precision}
        args.json.write_text(json.dumps({**facts, "arithmetic": arithmetic, "operations": rows}, indent=2) + "\n")


def openvino(
    graph: str, feed: dict, arithmetic: str, runs: int, threads: int | None = None
) -> tuple[Counter[str], Counter[str]]:
    """Return milliseconds and number of operations by kind and kernel, as OpenVINO's CPU plugin fused and ran them."""
    from openvino import Core

    core = Core()
    model = core.read_model(graph)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": arithmetic, "PERF_COUNT": True}
    options |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    nodes = defaultdict[tuple[str, str], list[float]](list)
    for number in range(runs + 1):
        request.infer(feed)
        for info in request.profiling_info if number else ():
            if milliseconds := info.real_time.total_seconds() * 1e3:
                nodes[f"{info.node_type} {info.exec_type}", info.node_name].append(milliseconds)
    return by_kind(nodes)


def onnxruntime(graph: str, feed: dict, runs: int, threads: int | None = None) -> tuple[Counter[str], Counter[str]]:
    """Return milliseconds and number by operator; fused operators have the names that ONNX Runtime gives them."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    options.enable_profiling = True
    nodes = defaultdict[tuple[str, str], list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, feed)
        for event in json.loads(Path(session.end_profiling()).read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                nodes[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    return by_kind(nodes)


def by_kind(nodes: dict[tuple[str, str], list[float]]) -> tuple[Counter[str], Counter[str]]:
    """Add up the median times of nodes, by (kind, name), and count them; medians leave interruptions out."""
    spent, counts = Counter[str](), Counter[str]()
    for (kind, _), times in nodes.items():
        spent[kind] += float(np.median(times))  # type: ignore[assignment]
        counts[kind] += 1
    return spent, counts


if __name__ == "__main__":
    main()
