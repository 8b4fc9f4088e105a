"""What is gained by computing once what stays the same over a prompt's steps: the UNet on OpenVINO, with and without.

Runs both in turns on one prompt with guidance, compares their results bit by bit, and reads from OpenVINO's own profile
which share of a step the keys and values of cross-attention and the timestep's embedding and projections take.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ldm_runtime import Bundle
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.specs import dummy_inputs

PARTS = {"keys and values": (".attn2.to_k", ".attn2.to_v"), "timestep": ("time_emb",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    graph, spec = bundle.graph("unet", "fp32"), bundle.manifest.components["unet"].spec
    feed = dummy_inputs(spec)
    feed["timestep"][:] = 500
    plain, cut = (OpenVinoBackend(graph, spec, args.precision, constant=name) for name in (None, "context"))
    prepared = {**feed, **cut.prepare({"context": feed["context"]})}
    equal = np.array_equal(plain.run(feed)["noise_pred"], cut.run(prepared)["noise_pred"])
    seconds: dict[str, list[float]] = {"plain": [], "prepared": []}
    for _ in range(args.runs):
        for name, backend, given in (("plain", plain, feed), ("prepared", cut, prepared)):
            start = time.perf_counter()
            backend.run(given)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    facts = {
        "machine": platform.processor() or platform.machine(),
        "tools": {"openvino": version("openvino")},
        "bundle": str(bundle.manifest.asked.get("checkpoint")),
        "precision": args.precision,
        "rows": len(feed["sample"]),
        "speed": medians["plain"] / medians["prepared"],
        "equal_to_the_bit": equal,
        "shares_of_a_step": shares(graph, spec, args.precision, feed),
    }
    print(json.dumps(facts, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def shares(graph, spec, precision, feed) -> dict[str, float]:
    """Of the time OpenVINO counts for the nodes of one step."""
    profiled = OpenVinoBackend(graph, spec, precision)
    profiled._main._options["PERF_COUNT"] = True
    for _ in range(4):
        profiled.run(feed)
    (request,) = profiled._main._requests.values()
    times = [(node.node_name, node.real_time.total_seconds()) for node in request.profiling_info]
    whole = sum(spent for _, spent in times)
    return {
        part: sum(spent for name, spent in times if any(mark in name for mark in marks)) / whole
        for part, marks in PARTS.items()
    }


if __name__ == "__main__":
    main()
