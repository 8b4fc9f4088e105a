"""Measures how much time each optimisation for the CPU saves, with and without it in turns in one process.

fused attention: the UNet's variant for ONNX Runtime, compared with the portable graph in time and result.
cross_attention_kv, time_embedding: these components run once instead of at every step, on OpenVINO.
folded: upsampling and convolution run as four small convolutions in bf16, with the error against fp32.
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
from ldm_runtime.bundle_layout import CPU_VARIANT
from ldm_runtime.specs import dummy_inputs

Run = Callable[[], np.ndarray]
ONCE = ("cross_attention_kv", "time_embedding")
"""Components that run less often than the UNet."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    parts = bundle.manifest.components
    savings = {
        "fused attention, unet": fused_attention(bundle, args.runs),
        **{f"{name}, unet": computed_once(bundle, name, args.runs) for name in ONCE if name in parts},
        "folded, unet": folded(bundle, "unet", args.runs),
        "folded, decoder": folded(bundle, "decoder", args.runs),
    }
    facts = {
        "machine": platform.processor() or platform.machine(),
        "tools": {name: version(name) for name in ("openvino", "onnxruntime")},
        "bundle": str(bundle.manifest.request.get("checkpoint")),
        "savings": savings,
    }
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def fused_attention(bundle: Bundle, runs: int) -> dict[str, Any]:
    feed, spec = inputs(bundle, "unet"), bundle.manifest.components["unet"].spec
    plain = OnnxRuntimeBackend(bundle.graph("unet", "fp32"), spec, "cpu")
    fused = OnnxRuntimeBackend(bundle.graph("unet", "fp32", CPU_VARIANT), spec, "cpu")
    results, speed = alternate(lambda: only(plain.run(feed)), lambda: only(fused.run(feed)), runs)
    difference = np.abs(results[0] - results[1]).max() / np.abs(results[0]).max()
    return {"speed": speed, "largest_relative_difference": float(difference)}


def computed_once(bundle: Bundle, name: str, runs: int) -> dict[str, Any]:
    """Speed-up of a step that does not run the component ``name``."""
    feed, unet = inputs(bundle, "unet"), backend(bundle, "unet")
    once, once_feed = backend(bundle, name), inputs(bundle, name)

    def every_step() -> np.ndarray:
        once.run(once_feed)
        return only(unet.run(feed))

    _, speed = alternate(every_step, lambda: only(unet.run(feed)), runs)
    return {"speed": speed}


def folded(bundle: Bundle, name: str, runs: int) -> dict[str, Any]:
    feed = inputs(bundle, name)
    (exact,) = backend(bundle, name, "fp32").run(feed).values()
    fold, counts = openvino_shapes.fold_upsampling, []
    openvino_shapes.fold_upsampling = lambda model: 0
    plain = backend(bundle, name)
    plain.run(feed)  # compiles it
    openvino_shapes.fold_upsampling = lambda model: counts.append(fold(model)) or counts[-1]
    rewritten = backend(bundle, name)
    rewritten.run(feed)
    openvino_shapes.fold_upsampling = fold
    results, speed = alternate(lambda: only(plain.run(feed)), lambda: only(rewritten.run(feed)), runs)
    errors = [float(np.sqrt(np.square(result - exact).mean())) for result in results]
    return {"folded": counts[0], "speed": speed, "rms_error_without": errors[0], "rms_error_with": errors[1]}


def alternate(without: Run, with_it: Run, runs: int) -> tuple[list[np.ndarray], float]:
    """Run two functions in turns; return their results, and how many times as fast the second one is, by medians."""
    results, seconds = [without(), with_it()], ([], [])
    for _ in range(runs):
        for run, times in zip((without, with_it), seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return results, statistics.median(seconds[0]) / statistics.median(seconds[1])


def backend(bundle: Bundle, name: str, arithmetic: str = "bf16", **options: Any) -> OpenVinoBackend:
    return OpenVinoBackend(bundle.graph(name, "fp32"), bundle.manifest.components[name].spec, arithmetic, **options)


def inputs(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    feed = dummy_inputs(bundle.manifest.components[name].spec)
    if "timestep" in feed:
        feed["timestep"][:] = 500
    return feed


def only(results: dict[str, np.ndarray]) -> np.ndarray:
    (array,) = results.values()
    return array


if __name__ == "__main__":
    main()
