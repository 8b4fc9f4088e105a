"""``ldm-export doctor``: list engines, GPU, CPU features and versions of this machine, and what is missing."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm_export.screen import Screen, human_bytes
from ldm_runtime.installation import install_command

__all__ = ["add_arguments", "run"]


@dataclass(frozen=True)
class _Part:
    """Purpose of an extra of ldm-export, and the packages that it needs: module -> distribution."""

    purpose: str
    extra: str
    packages: Mapping[str, tuple[str, ...]]


PARTS = (
    _Part("ONNX Runtime on CPUs", "onnxruntime", {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}),
    _Part("ONNX Runtime on NVIDIA GPUs", "gpu", {"onnxruntime": ("onnxruntime-gpu",), "cuda": ("cuda-bindings",)}),
    _Part("OpenVINO on CPUs", "openvino", {"openvino": ("openvino",)}),
    _Part("TensorRT for RTX", "tensorrt-rtx", {"tensorrt_rtx": ("tensorrt-rtx",), "cuda": ("cuda-bindings",)}),
    _Part("TensorRT", "tensorrt", {"tensorrt": ("tensorrt",), "cuda": ("cuda-bindings",)}),
    _Part(
        "build, verify and calibrate",
        "export",
        {name: (name.replace("_", "-"),) for name in ("torch", "diffusers", "transformers", "onnx", "onnxscript")},
    ),
    _Part(
        "serve over HTTP",
        "serve",
        {"starlette": ("starlette",), "uvicorn": ("uvicorn",), "python_multipart": ("python-multipart",)},
    ),
    _Part("clients of Triton", "client", {"tritonclient": ("tritonclient",)}),
)
"""Parts in the order of the table."""


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    verb.add_argument("bundle", type=Path, nargs="?", help="also say which engine would run this bundle, and why")


def run(args: argparse.Namespace, screen: Screen) -> None:
    """Run the command."""
    from ldm_export.bench.figures import machine

    facts: dict[str, Any] = {"machine": machine(), "gpu": _gpu(), "parts": [_found(part) for part in PARTS]}
    if args.bundle is not None:
        facts["bundle"] = _choice(args.bundle)
    if args.json:
        screen.json(facts)
        return
    here = facts["machine"]
    rows = [
        ["processor", here["processor"]],
        ["extensions", ", ".join(here["extensions"]) or "none of those that engines use"],
        ["cores", str(here["cores"])],
        ["memory", human_bytes(here["memory_bytes"])],
        ["GPU", facts["gpu"]],
        ["Python", here["python"]],
        ["ldm-export", version("ldm-export")],
    ]
    screen.table("machine", ["", ""], rows)
    screen.table(
        "packages",
        ["for", "found"],
        [
            [part["purpose"], ", ".join(f"{name} {number}" for name, number in part["versions"].items())]
            if part["complete"]
            else [part["purpose"], f"not installed: {part['install']}"]
            for part in facts["parts"]
        ],
    )
    if "bundle" in facts:
        screen.table(f"engine for {args.bundle}", ["", ""], [[name, text] for name, text in facts["bundle"].items()])


def _gpu() -> str:
    from ldm_runtime.backends.driver import installed_gpu

    gpu = installed_gpu()
    if isinstance(gpu, str):
        return gpu
    return f"compute capability {gpu.capability}; the driver supports CUDA up to {gpu.cuda[0]}.{gpu.cuda[1]}"


def _found(part: _Part) -> dict[str, Any]:
    """Check the packages of a part: whether they are complete, installed versions, and the command for missing ones."""
    from ldm_export.bench.figures import versions as installed_versions

    versions: dict[str, str] = {}
    complete = True
    for module, distributions in part.packages.items():
        installed = installed_versions(distributions)
        complete &= bool(installed) and importlib.util.find_spec(module) is not None
        versions |= installed
    return {
        "purpose": part.purpose,
        "extra": part.extra,
        "complete": complete,
        "versions": versions,
        "install": install_command(part.extra),
    }


def _choice(folder: Path) -> dict[str, str]:
    from ldm_runtime.backends.selection import select_backend
    from ldm_runtime.bundle import Bundle
    from ldm_runtime.errors import BackendError

    bundle = Bundle.open(folder)
    try:
        selected = select_backend(bundle)
    except BackendError as error:
        return {"none": str(error)}
    refused = {f"not used {number}": text for number, text in enumerate(selected.refusals, 1)}
    return {**selected.choice.facts(), **refused}
