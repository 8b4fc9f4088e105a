"""Measures what each saving on the CPU is worth: with and without it, alternating in one process.

fused: ONNX Runtime's variant of the UNet with fused attention, and by how much results differ.
folded: upsampling and convolution as four small convolutions, in bf16; error against fp32 with and without.
Shares: cost, relative to a UNet call, of the components that are split off the UNet and run once per prompt or schedule
instead of at every step.
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
        "fused, unet": fused(bundle, args.runs),
        "folded, unet": folded(bundle, "unet", args.runs),
        "folded, decoder": folded(bundle, "decoder", args.runs),
    }
    facts = {
        "machine": platform.processor() or platform.machine(),
        "tools": {name: version(name) for name in ("openvino", "onnxruntime")},
        "bundle": str(bundle.manifest.request.get("checkpoint")),
        "savings": savings,
        "shares_of_a_step": {
            name: shared_share(bundle, name, args.runs)
            for name in ("cross_attention_kv", "time_embedding")
            if name in bundle.manifest.components
        },
    }
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def fused(bundle: Bundle, runs: int) -> dict[str, Any]:
    """Compare the portable UNet with its variant for ONNX Runtime."""
    feed, spec = inputs(bundle, "unet"), bundle.manifest.components["unet"].spec
    plain, variant = (
        OnnxRuntimeBackend(bundle.graph("unet", "fp32", name), spec, "cpu") for name in ("", "onnxruntime")
    )
    results, speed = in_turns(lambda: only(plain.run(feed)), lambda: only(variant.run(feed)), runs)
    difference = np.abs(results[0] - results[1]).max() / np.abs(results[0]).max()
    return {"speed": speed, "largest_difference_of_scale": float(difference)}


def shared_share(bundle: Bundle, component: str, runs: int) -> float:
    """Seconds of one call of a component that runs once per prompt or schedule, as a share of a UNet call's."""
    seconds = []
    for name in (component, "unet"):
        feed, one = inputs(bundle, name), backend(bundle, name)
        one.run(feed)  # compiles the graph
        seconds.append(median_seconds(lambda one=one, feed=feed: one.run(feed), runs))
    return seconds[0] / seconds[1]


def folded(bundle: Bundle, name: str, runs: int) -> dict[str, Any]:
    feed = inputs(bundle, name)
    (exact,) = backend(bundle, name, "fp32").run(feed).values()
    fold, counts = openvino_shapes.fold_upsampling, []
    openvino_shapes.fold_upsampling = lambda model: 0
    plain = backend(bundle, name)
    plain.run(feed)  # compiles the graph
    openvino_shapes.fold_upsampling = lambda model: counts.append(fold(model)) or counts[-1]
    folding = backend(bundle, name)
    folding.run(feed)
    openvino_shapes.fold_upsampling = fold
    results, speed = in_turns(lambda: only(plain.run(feed)), lambda: only(folding.run(feed)), runs)
    errors = [float(np.sqrt(np.square(result - exact).mean())) for result in results]
    return {"folded": counts[0], "speed": speed, "rms_error_without": errors[0], "rms_error_with": errors[1]}


def in_turns(without: Run, with_it: Run, runs: int) -> tuple[list[np.ndarray], float]:
    """Return both results, and the speed of the second relative to the first, by medians."""
    results, seconds = [without(), with_it()], ([], [])
    for _ in range(runs):
        for run, values in zip((without, with_it), seconds, strict=True):
            start = time.perf_counter()
            run()
            values.append(time.perf_counter() - start)
    return results, statistics.median(seconds[0]) / statistics.median(seconds[1])


def median_seconds(run: Callable[[], object], runs: int) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def backend(bundle: Bundle, name: str, arithmetic: str = "bf16", **options: Any) -> OpenVinoBackend:
    return OpenVinoBackend(bundle.graph(name, "fp32"), bundle.manifest.components[name].spec, arithmetic, **options)


def inputs(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    return dummy_inputs(bundle.manifest.components[name].spec)


def only(results: dict[str, np.ndarray]) -> np.ndarray:
    (array,) = results.values()
    return array


if __name__ == "__main__":
    main()
