"""Measures int8 at full size: the peak memory of calibration, and the time of a UNet call compared with bf16.

Give the bundle of a large model, for example from `ldm-export build configs/text2im-large --random-weights -o
build/full`. The script calibrates a copy of hard links, so the bundle does not change. Random weights give the memory
and the speed of a trained model, but images without meaning, so there is no quality budget.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from ldm_export.bench.figures import machine, speedup, versions
from ldm_runtime import Bundle
from ldm_runtime.specs import dummy_inputs

OPTIONS = (
    "--calibration-steps",
    "3",
    "--sensitivity",
    "results",
    "--trials",
    "1",
    "--trial-steps",
    "2",
    "--min-psnr",
    "0",
)
ROUNDS = 9
ALLOWED_BEYOND_WEIGHTS = 4e9


def linked(bundle: Path, place: Path) -> Path:
    """Copy a bundle with hard links."""
    for file in bundle.rglob("*"):
        if file.is_file():
            (place / file.relative_to(bundle)).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, place / file.relative_to(bundle))
    return place


def calibrated(bundle: Path) -> dict[str, Any]:
    """Calibrate in a separate process and return seconds and peak memory."""
    prompts = bundle.with_name("prompts.txt")
    prompts.write_text("a painting of a squirrel eating a burger\n")
    command = [sys.executable, "-m", "ldm_export.cli", "calibrate", str(bundle), "--prompts", str(prompts), *OPTIONS]
    begun = time.monotonic()
    subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    files = Bundle.open(bundle).manifest.files
    weights = sum(fact.size for name, fact in files.items() if name.startswith("unet/fp32.onnx"))
    allowed = weights + ALLOWED_BEYOND_WEIGHTS
    return {
        "seconds": time.monotonic() - begun,
        "peak_bytes": peak,
        "unet_weights_bytes": weights,
        "allowed_bytes": int(allowed),
        "within": peak <= allowed,
    }


def compiled(graph: Path, feed: dict[str, NDArray[Any]], hint: str) -> openvino.CompiledModel:
    core = openvino.Core()
    model = core.read_model(graph)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})


def kinds(model: openvino.CompiledModel) -> dict[str, int]:
    """Return type -> number of convolutions and matrix products that the compiled graph executes in it."""
    counts: Counter[str] = Counter()
    for operation in model.get_runtime_model().get_ops():
        facts = operation.get_rt_info()
        if facts["layerType"].get() in ("Convolution", "FullyConnected", "MatMul"):
            counts[facts["runtimePrecision"].get()] += 1
    return dict(counts)


def timed(bundle: Path) -> dict[str, Any]:
    """Time one UNet call of a guided image: the fp32 graph in bf16 and the int8 graph, alternating."""
    opened = Bundle.open(bundle)
    feed = {
        name: np.resize(array, (2, *array.shape[1:]))
        for name, array in dummy_inputs(opened.manifest.components["unet"].spec).items()
    }
    models = {
        "bf16": compiled(opened.graph("unet", "fp32"), feed, "bf16"),
        "int8": compiled(opened.graph("unet", "int8"), feed, "bf16"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name, model in (*models.items(), *(list(models.items()) * ROUNDS)):
        begun = time.perf_counter()
        model(feed)
        seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "seconds": medians,
        "least_seconds": {name: min(times) for name, times in seconds.items()},
        "ratio": speedup(seconds["int8"][1:], seconds["bf16"][1:]),
        "computed_in": {name: kinds(model) for name, model in models.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the calibrated bundle; if it exists, it is only timed")
    parser.add_argument("--part", choices=("memory", "speed", "both"), default="both")
    parser.add_argument("--json", type=Path, help="write the figures here; figures of the other part are kept")
    args = parser.parse_args()
    with TemporaryDirectory(dir=args.bundle.parent) as folder:
        place = args.keep or Path(folder) / "bundle"
        facts: dict[str, Any] = {}
        if args.json and args.json.is_file():
            facts = json.loads(args.json.read_text())
        if not (place / "manifest.json").is_file():
            linked(args.bundle, place)
        if args.part != "speed":
            facts["calibration"] = calibrated(place)
        if args.part != "memory":
            facts["unet_call"] = timed(place)
        report = json.loads(Bundle.open(place).file("report/int8.json").read_text())
    facts["unet_int8_share"] = report["summary"]["unet_int8_share"]
    facts["bytes"] = {side: report["summary"][f"bytes_{side}"] for side in ("fp32", "int8")}
    facts |= {"machine": machine(), "tools": versions()}
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
