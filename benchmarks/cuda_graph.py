"""Counts the operators of the graphs for ONNX Runtime on CUDA, beside those of the portable fp16 graphs.

The counts show whether a Cast, Transpose or Reshape was added or a fusion lost. Neither a GPU nor the weights are
needed:

    ldm-export build CONFIGS --random-weights --precision fp16 --target onnxruntime-cuda -o bundle
    python benchmarks/cuda_graph.py bundle --json figures.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import onnx
from rich.console import Console
from rich.table import Table

from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import CUDA_VARIANT
from ldm_runtime.errors import LdmError

SHAPES = frozenset(("Shape", "Reshape", "Unsqueeze", "Squeeze", "Gather", "Slice", "Concat", "Identity"))
"""Operators that mostly compute shapes or only give data another shape; they launch few kernels or none."""
SHOWN = ("Cast", "Transpose", "InstanceNormalization", "Softmax")
"""Operators that fusions remove."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="built with --target onnxruntime-cuda")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    try:
        figures = counts(Bundle.open(args.bundle))
    except LdmError as error:
        print(f"cuda_graph.py: error: {error}", file=sys.stderr)
        return 1
    table = Table("component", "graph", "nodes", "that compute", *SHOWN)
    for component, graphs in figures.items():
        for kind, operators in graphs.items():
            computing = sum(count for name, count in operators.items() if name not in SHAPES)
            shown = (str(operators.get(name, 0)) for name in SHOWN)
            table.add_row(component, kind, str(sum(operators.values())), str(computing), *shown)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def counts(bundle: Bundle) -> dict[str, dict[str, dict[str, int]]]:
    """Component -> "portable" or "cuda" -> operator -> number of nodes, the most frequent first."""
    figures = {}
    for name, component in bundle.manifest.components.items():
        if CUDA_VARIANT in component.variants:
            files = {"portable": component.graphs["fp16"], "cuda": component.variants[CUDA_VARIANT]["fp16"]}
            figures[name] = {kind: operators(bundle.folder / file) for kind, file in files.items()}
    return figures


def operators(graph: Path) -> dict[str, int]:
    """Operator -> number of nodes in a graph."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes).most_common())


if __name__ == "__main__":
    sys.exit(main())
