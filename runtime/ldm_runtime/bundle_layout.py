"""Layout of a bundle: the paths of graphs, weights, engines and reports. No other module contains them."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from ldm_runtime.model import SHALLOW_UNET, UNET

__all__ = [
    "BUILD_LOG",
    "CALIBRATION_RECORD",
    "CPU_VARIANT",
    "CUDA_VARIANT",
    "INT8_REPORT",
    "LORAS",
    "MANIFEST",
    "PORTABLE_PRECISION",
    "QUALITY_REPORT",
    "RANGES_REPORT",
    "TOKENIZER",
    "TOKENIZER_2",
    "VERIFY_PAGE",
    "engine_file",
    "files_of_graph",
    "graph_file",
    "lora_file",
    "precision_report",
    "weights_beside",
    "weights_file",
]

MANIFEST, BUILD_LOG = "manifest.json", "build-log.json"
TOKENIZER, TOKENIZER_2 = "tokenizer.json", "tokenizer_2.json"
"""Tokenizers of the first and of the second text encoder."""
CALIBRATION_RECORD = "calibration.json"
RANGES_REPORT, INT8_REPORT, VERIFY_PAGE = "report/ranges.json", "report/int8.json", "report/verify.html"
QUALITY_REPORT = "report/quality.json"
"""Measured settings: seconds per image and image quality."""

LORAS = "loras"
"""Folder of the LoRA adapters."""

PORTABLE_PRECISION = "fp32"
"""Precision of the portable graphs. Every build writes them, and all other graphs are made from them."""
CPU_VARIANT, CUDA_VARIANT = "onnxruntime-cpu", "onnxruntime-cuda"
"""Names of the variants of a graph with ONNX Runtime's own operators: for the CPU, and in fp16 for CUDA."""
_SHALLOW = "shallow"
_VARIANT = re.compile(r"([^./]+)\.[^./]+\.onnx$")


def graph_file(component: str, precision: str, variant: str = "") -> str:
    """Path of a component's ONNX graph; ``variant`` names the engine whose passes rewrote it.

    The graphs of the shallow UNet lie beside those of the UNet, whose weights they read.
    """
    if component == SHALLOW_UNET:
        component, variant = UNET, f"{_SHALLOW}-{variant}" if variant else _SHALLOW
    return f"{component}/{precision}.{variant}.onnx" if variant else f"{component}/{precision}.onnx"


def weights_file(graph: str) -> str:
    """Path of the external weights of a graph. Small graphs have none; variants may use those of the portable graph."""
    return f"{graph}.data"


def weights_beside(graph: Path) -> Path:
    """``weights_file`` for a graph on disk."""
    return graph.with_name(weights_file(graph.name))


def files_of_graph(graph: str, files: Collection[str]) -> list[str]:
    """A graph and, if it is among ``files``, the file of its external weights.

    The weights are the graph's own, those of the whole graph for a shallow graph, or those of the portable graph.
    """
    sources = (graph, graph.replace(f".{_SHALLOW}-", "."), _VARIANT.sub(r"\1.onnx", graph))
    weights = [file for file in map(weights_file, sources) if file in files]
    return [graph, *weights[:1]]


def engine_file(component: str, precision: str, request: str) -> str:
    """Path of a TensorRT engine; ``request`` names package and GPUs, e.g. "tensorrt-rtx-8.6-8.9"."""
    return f"{component}/{precision}.{request}.engine"


def lora_file(name: str, sha256: str) -> str:
    """Path of the factors of a LoRA adapter with this digest (hex)."""
    return f"{LORAS}/{name}.{sha256[:16]}.safetensors"


def precision_report(component: str, precision: str) -> str:
    """Path of the report on the operators of a reduced-precision graph that stay in fp32."""
    return f"report/{component}.{precision}.json"
