"""What each saving on the CPU is worth by itself: with and without it in turns, in one process.

keyed, in ONNX Runtime: fused attention, and keys and values computed once for a prompt; and by how much results differ.
prepared: keys and values of cross-attention, computed once for a prompt, not at every step; equal to the bit.
folded: doubling and convolution as four small convolutions, in bf16 arithmetic; error against fp32 with and without.
And the share of a step that the timestep's embedding and projections take, which are computed at every step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ldm_runtime.backends.onnxruntime_keyed import KEYED, KEYS, KeyedUNetBackend

from ldm_runtime import Bundle
from ldm_runtime.backends import openvino_shapes
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.specs import dummy_inputs

Run = Callable[[], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    savings = {
        "keyed, unet": keyed(bundle, args.runs),
        "prepared, unet": prepared(bundle, args.runs),
        "folded, unet": folded(bundle, "unet", args.runs),
        "folded, decoder": folded(bundle, "decoder", args.runs),
    }
    facts = {
        "machine": platform.processor() or platform.machine(),
        "tools": {name: version(name) for name in ("openvino", "onnxruntime")},
        "bundle": str(bundle.manifest.asked.get("checkpoint")),
        "savings": savings,
        "timestep_share_of_a_step": timestep_share(bundle),
    }
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def keyed(bundle: Bundle, runs: int) -> dict[str, Any]:
    feed, parts = given(bundle, "unet"), bundle.manifest.components
    plain = OnnxRuntimeBackend(bundle.graph("unet", "fp32"), parts["unet"].spec, "cpu")
    graphs = [(bundle.graph(name, "fp32"), parts[name].spec) for name in (KEYS, KEYED)]
    made = KeyedUNetBackend(parts["unet"].spec, *graphs)
    shared = {**feed, **made.prepare({"context": feed["context"]})}
    results, speed = in_turns(lambda: plain.run(feed)["noise_pred"], lambda: made.run(shared)["noise_pred"], runs)
    apart = np.abs(results[0] - results[1]).max() / np.abs(results[0]).max()
    return {"speed": speed, "largest_difference_of_scale": float(apart)}


def prepared(bundle: Bundle, runs: int) -> dict[str, Any]:
    feed = given(bundle, "unet")
    plain, cut = backend(bundle, "unet"), backend(bundle, "unet", constant="context")
    shared = {**feed, **cut.prepare({"context": feed["context"]})}
    results, speed = in_turns(lambda: plain.run(feed)["noise_pred"], lambda: cut.run(shared)["noise_pred"], runs)
    return {"speed": speed, "equal_to_the_bit": bool(np.array_equal(*results))}


def folded(bundle: Bundle, name: str, runs: int) -> dict[str, Any]:
    feed = given(bundle, name)
    (exact,) = backend(bundle, name, "fp32").run(feed).values()
    fold, counts = openvino_shapes.fold_upsampling, []
    openvino_shapes.fold_upsampling = lambda model: 0
    plain = backend(bundle, name)
    plain.run(feed)  # which compiles it
    openvino_shapes.fold_upsampling = lambda model: counts.append(fold(model)) or counts[-1]
    made = backend(bundle, name)
    made.run(feed)
    openvino_shapes.fold_upsampling = fold
    results, speed = in_turns(lambda: one(plain.run(feed)), lambda: one(made.run(feed)), runs)
    errors = [float(np.sqrt(np.square(result - exact).mean())) for result in results]
    return {"folded": counts[0], "speed": speed, "rms_error_without": errors[0], "rms_error_with": errors[1]}


def timestep_share(bundle: Bundle) -> float:
    """Of the time that OpenVINO counts for the nodes of one UNet call."""
    profiled, feed = backend(bundle, "unet"), given(bundle, "unet")
    profiled._main._options["PERF_COUNT"] = True
    for _ in range(4):
        profiled.run(feed)
    ((request, _),) = profiled._main._requests.values()
    times = [(node.node_name, node.real_time.total_seconds()) for node in request.profiling_info]
    return sum(spent for name, spent in times if "time_emb" in name) / sum(spent for _, spent in times)


def in_turns(without: Run, with_it: Run, runs: int) -> tuple[list[np.ndarray], float]:
    """Both results, and how many times faster the second is, by medians."""
    results, seconds = [without(), with_it()], ([], [])
    for _ in range(runs):
        for run, found in zip((without, with_it), seconds, strict=True):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return results, statistics.median(seconds[0]) / statistics.median(seconds[1])


def backend(bundle: Bundle, name: str, arithmetic: str = "bf16", **options: Any) -> OpenVinoBackend:
    return OpenVinoBackend(bundle.graph(name, "fp32"), bundle.manifest.components[name].spec, arithmetic, **options)


def given(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    feed = dummy_inputs(bundle.manifest.components[name].spec)
    if "timestep" in feed:
        feed["timestep"][:] = 500
    return feed


def one(results: dict[str, np.ndarray]) -> np.ndarray:
    (array,) = results.values()
    return array


if __name__ == "__main__":
    main()
