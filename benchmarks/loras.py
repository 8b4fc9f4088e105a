"""Measures what LoRA adapters of a bundle cost: seconds of the first and of later images, and memory.

The script adds random adapters of rank 8 to a copy of the bundle. They change every layer of the UNet and of the text
encoders.

Memory is the peak of the process while it generates an image, and what is resident after it. Mapped files count where
they are in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from ldm_export.bundle.add_lora import change_loras
from ldm_export.lora import adapter_of
from ldm_runtime import Bundle, LatentDiffusionPipeline
from ldm_runtime.bundle_layout import files_of_graph
from ldm_runtime.loras.changes import changed_part
from ldm_runtime.loras.graph_layers import graph_layers

RANK, SCALE = 8, 0.01
CLEAR_REFS = Path("/proc/self/clear_refs")
NAMES = ("a", "b", "c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes"))
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, help="height and width (default: the model's)")
    parser.add_argument("--repeats", type=int, default=5, help="images whose median is a time of later ones")
    parser.add_argument("--selections", type=int, default=2, help="selections that stay loaded (default 2)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.bundle.resolve().parent) as folder:
        bundle = with_adapters(args.bundle, Path(folder))
        facts = measure(bundle, args)
    table = Table("image", "seconds", "peak", "after it")
    for row in facts["rows"]:
        memory = (f"{row[name]:.0f} MB" for name in ("peak_megabytes", "megabytes"))
        table.add_row(row["image"], f"{row['seconds']:.2f}", *memory)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def with_adapters(source: Path, folder: Path) -> Bundle:
    """Return a copy of a bundle with random adapters; its files are hard links."""
    copy = Path(shutil.copytree(source, folder / "bundle", copy_function=lambda a, b: Path(b).hardlink_to(a)))
    bundle, generator, added = Bundle.open(copy), np.random.default_rng(0), {}
    for name in NAMES:
        factors: dict[str, Any] = {}
        for component in bundle.manifest.components:
            part = changed_part(bundle.manifest.model, component)
            for layer in () if part is None else graph_layers(bundle.graph(component, "fp32")):
                rows, *columns = layer.shape
                down, up = (RANK, *columns), (rows, RANK, *(1 for _ in columns[1:]))
                for side, shape in (("A", down), ("B", up)):
                    values = SCALE * generator.standard_normal(shape)
                    factors[f"{part}.{layer.module}.lora_{side}.weight"] = values.astype(np.float16)
        file = folder / f"{name}.safetensors"
        save_file(factors, file)
        added[name] = adapter_of(bundle, file), file.name
    return change_loras(copy, added)


def measure(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of images and resident memory after them, in the order in which they are generated."""
    options = {"num_inference_steps": args.steps, "seed": 0, "height": args.size, "width": args.size}
    rows = []
    with LatentDiffusionPipeline.from_bundle(
        bundle,
        precision=args.precision,
        backend=args.backend,
        threads=args.threads,
        lora_selections=args.selections,
    ) as pipeline:
        fields = {**pipeline.example(), **options}

        def generate(image: str, loras: dict[str, float], repeats: int = 1) -> None:
            seconds = []
            CLEAR_REFS.write_text("5")  # the peak becomes the present memory
            for _ in range(repeats):
                begun = time.perf_counter()
                pipeline(**fields, loras=loras)
                seconds.append(time.perf_counter() - begun)
            peak, now = megabytes("VmHWM"), megabytes("VmRSS")
            rows.append({"image": image, "seconds": median(seconds), "peak_megabytes": peak, "megabytes": now})

        generate("first, without an adapter", {})
        generate("later, without an adapter", {}, args.repeats)
        generate("first with adapter a", {"a": 1.0})
        generate("later with adapter a", {"a": 1.0}, args.repeats)
        generate("first with adapters a and b", {"a": 0.5, "b": 0.5})
        generate("with adapter a again", {"a": 1.0})
        generate("first with adapter c", {"c": 1.0})
        generate("without an adapter again", {})
    layers = {name: dict(lora.layers) for name, lora in bundle.manifest.loras.items()}
    return {
        "backend": args.backend,
        "precision": args.precision,
        "threads": args.threads,
        "options": options,
        "rank": RANK,
        "selections": args.selections,
        "changed_megabytes": changed_bytes(bundle) / 1e6,
        "layers": layers[NAMES[0]],
        "tools": {args.backend: version(args.backend)},
        "rows": rows,
    }


def changed_bytes(bundle: Bundle) -> int:
    """Size of the fp32 graphs and weights of the components that the adapters change."""
    files, parts = bundle.manifest.files, bundle.manifest.components.items()
    graphs = [part.graphs["fp32"] for name, part in parts if changed_part(bundle.manifest.model, name) is not None]
    names = {name for graph in graphs for name in files_of_graph(graph, files)}
    return sum(files[name].size for name in names)


def megabytes(name: str) -> float:
    """Memory of this process: "VmRSS" is resident now, "VmHWM" its peak."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:")) * 1024 / 1e6


if __name__ == "__main__":
    main()
