"""Measures the peak memory of generating an image, and compares it with the size of the weights in use.

Each combination of engine and precision runs in its own process. The limit is 1.25 × the weights of all components in
the precision of the arithmetic, plus 1 GB.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from ldm_runtime import Bundle

PROMPT = "a painting of a squirrel eating a burger"
COMBINATIONS = (("openvino", "fp32"), ("openvino", "bf16"), ("onnxruntime", "fp32"))
BYTES = {"fp32": 4, "bf16": 2}
ONE = """
import json, resource, sys
from ldm_runtime import LatentDiffusionPipeline
folder, backend, precision, steps, keep, prompt = sys.argv[1:]
with LatentDiffusionPipeline.from_bundle(
    folder, backend=backend, precision=precision, keep_loaded=keep == "True"
) as pipeline:
    pipeline(prompt, seed=1, eta=0.3, guidance_scale=6.0, num_inference_steps=int(steps))
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    manifest = Bundle.open(args.bundle).manifest
    names = [part.graphs["fp32"] for part in manifest.components.values()]
    weights = sum(fact.size for name, fact in manifest.files.items() if name.removesuffix(".data") in names)
    rows = []
    for backend, precision in COMBINATIONS:
        for keep in (False, True):
            arguments = map(str, (args.bundle, backend, precision, args.steps, keep, PROMPT))
            done = subprocess.run([sys.executable, "-c", ONE, *arguments], capture_output=True, text=True, check=True)
            weight_bytes = weights * BYTES[precision] // 4
            peak, allowed = json.loads(done.stdout.splitlines()[-1]), 1.25 * weight_bytes + 1e9
            rows.append({"backend": backend, "precision": precision, "keep_loaded": keep, "peak_bytes": peak})
            rows[-1] |= {"weights_bytes": weight_bytes, "allowed_bytes": int(allowed), "within": peak <= allowed}
            print(f"{backend} {precision} keep_loaded={keep}: {peak / 1e9:.2f} GB, allowed {allowed / 1e9:.2f} GB")
    if args.json:
        tools = {name: version(name) for name in ("onnxruntime", "openvino", "numpy")}
        facts = {"machine": platform.processor() or platform.machine(), "tools": tools, "steps": args.steps}
        facts |= {"bundle": str(manifest.request.get("checkpoint")), "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
