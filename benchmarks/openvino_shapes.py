"""Compares OpenVINO's UNet for any shape with UNets compiled for one set of shapes, for several numbers of rows.

Seconds are medians of single calls in turns. ``PADDING`` of ``ldm_runtime.backends.openvino_shapes`` is based on the
ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from ldm_export.bench.figures import machine
from ldm_runtime import Bundle
from ldm_runtime.backends.factory import open_component
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.specs import dummy_inputs

ROWS = (2, 8, 16, 32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calls", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    own, free = (open_component(bundle, "unet", "openvino") for _ in range(2))
    _any_shape(free)
    feed = dummy_inputs(bundle.manifest.components["unet"].spec, "opt", 0)
    ratios = {}
    for rows in ROWS:
        inputs = {name: array[:1].repeat(rows, axis=0) for name, array in feed.items()}
        seconds: dict[LazyBackend, list[float]] = {own: [], free: []}
        for backend in (own, free):
            backend.run(inputs)  # compiles
        for _ in range(args.calls):
            for backend, found in seconds.items():
                begun = time.perf_counter()
                backend.run(inputs)
                found.append(time.perf_counter() - begun)
        ratios[rows] = round(statistics.median(seconds[free]) / statistics.median(seconds[own]), 2)
    facts = {"machine": machine(), "calls": args.calls, "any_shape_to_own_shapes_by_rows": ratios}
    print(json.dumps(facts, indent=2))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def _any_shape(backend: LazyBackend) -> None:
    loaded = backend.load()
    assert isinstance(loaded, OpenVinoBackend)
    loaded._shaped.max_requests = 0


if __name__ == "__main__":
    sys.exit(main())
