"""Compares the int8 UNet with those of ONNX Runtime's ``quantize_static`` and NNCF's post-training quantization.

All use the same fp32 graph, calibration samples, requests, seeds and engine; the other components stay in fp32. For
each UNet the script measures the share of the operations that the engine executes in int8, the PSNR of the images
against fp32, and, with prompts, the share of images that show what the prompt says.

Build the bundle with ``ldm-export build --precision int8 -o build/shapes-int8``. For a model that starts from images,
give the folder of the calibration's inputs and one of other inputs; inputs that the calibration used are not compared.
``python -m ldm_export_demo.samples FOLDER`` writes some for the demo models. NNCF runs in an environment of its
own, which the script creates in the work folder unless --nncf gives one. A run that was killed continues with the
missing images.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from compared_requests import batches, prompts_of, read_requests
from executed import OpenVinoFormat, int8_share
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm_calibration.inputs import json_fields
from ldm_calibration.model import CalibrationModel, ImageRequest
from ldm_calibration.sampling import feeds_of
from ldm_calibration.settings import CalibrationSettings
from ldm_calibration.trajectories import run_trajectories
from ldm_export_demo.grader import accuracy
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.atomic_files import sha256
from ldm_runtime.backends import Backend
from ldm_runtime.backends.engine import pipeline_components
from ldm_runtime.backends.onnxruntime import OnnxRuntimeBackend
from ldm_runtime.backends.openvino import OpenVinoBackend
from ldm_runtime.bundle import Bundle
from ldm_runtime.images import psnr
from ldm_runtime.specs import ComponentSpec

NNCF = ("nncf==3.4.0", "openvino==2026.4.1")
SAMPLING, GUIDANCE = {"num_inference_steps": 50, "eta": 0.3}, 6.0
MATRIX = ("Conv", "MatMul", "Gemm")
"""``quantize_static`` fails on this graph with its defaults ("Quantization parameter shared mode is not supported for
weight yet", preprocessed or not), and without Reshape it gives a graph that OpenVINO refuses to load."""
Feed = Mapping[str, NDArray[Any]]
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Variant:
    """A UNet to compare: its name, how it was made, and its graph in ONNX or OpenVINO's format."""

    name: str
    how: str
    graph: Path


class Reader(CalibrationDataReader):
    """The samples as ONNX Runtime's quantizer reads them."""

    def __init__(self, feeds: Sequence[Feed]):
        self.feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self.feeds, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/shapes-int8"), help="built with --precision int8")
    parser.add_argument("--inputs", type=Path, metavar="FOLDER", help="the inputs of the calibration")
    parser.add_argument("--others", type=Path, metavar="FOLDER", help="inputs to compare (default: unused --inputs)")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts or inputs to compare")
    parser.add_argument("--backend", choices=("openvino", "onnxruntime"), default="openvino")
    parser.add_argument("--nncf", type=Path, metavar="PYTHON", help="with nncf (default: a new environment)")
    parser.add_argument(
        "--work", type=Path, default=Path("build/quantizers"), help="folder for graphs, images and environments"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    settings, requests = read_requests(bundle, args.inputs, args.others, args.prompts)
    prompts = prompts_of(requests)
    args.work.mkdir(parents=True, exist_ok=True)
    variants = list(make_variants(bundle, settings, args))
    generated = {variant.name: draw(bundle, variant.graph, args.backend, requests, args.work) for variant in variants}
    spec = bundle.manifest.components["unet"].spec
    rows = []
    for variant in variants:
        share = int8_share(variant.graph, spec) if args.backend == "openvino" else None
        rows.append({"name": variant.name, "how": variant.how, "int8_share": share})
        rows[-1] |= quality(generated[variant.name], generated["fp32"], prompts)
    tools = {name: version(name) for name in ("onnxruntime", "openvino", "numpy")} | {
        "nncf": NNCF[0].partition("==")[2]
    }
    sampling = {**SAMPLING, "guidance_scale": GUIDANCE} if prompts else SAMPLING
    figures = {
        "settings": {"backend": args.backend, "requests": len(requests), "family": bundle.manifest.family, **sampling},
        "machine": platform.processor() or platform.machine(),
        "tools": tools,
        "rows": rows,
    }
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


def make_variants(bundle: Bundle, settings: CalibrationSettings, args: argparse.Namespace) -> Iterator[Variant]:
    """Yield the fp32 and int8 UNets of the bundle, and those of the other quantizers.

    The others quantize with their defaults, and only the layers that the bundle's UNet has in int8.
    """
    source = bundle.graph("unet", "fp32")
    yield Variant("fp32", "the reference", source)
    yield Variant("ours", "ldm-export build --precision int8", bundle.graph("unet", "int8"))
    layers = json.loads(bundle.file("report/int8.json").read_text())["components"]["unet"]["layers"]
    floats = [layer["name"] for layer in layers if not layer["int8"]]
    record = bundle.file("calibration.json")
    folder = args.work / digest(sha256(source), sha256(record))[:16]  # results of other inputs are not reused
    folder.mkdir(exist_ok=True)
    feeds = calibration_feeds(bundle, settings)
    same = {"op_types_to_quantize": list(MATRIX), "nodes_to_exclude": floats}
    peers = {
        "all layers": ("defaults but for op_types_to_quantize", {"op_types_to_quantize": list(MATRIX)}),
        "our layers": ("the layers ours quantizes", same),
        "our layers, per channel": ("the same, per_channel=True", {**same, "per_channel": True}),
    }
    for name, (how, options) in peers.items():
        target = folder / f"onnxruntime {name}.onnx"
        if not target.exists():
            quantize_static(source, target.with_suffix(".part"), Reader(feeds), **options)
            target.with_suffix(".part").rename(target)
        yield Variant(f"onnxruntime, {name}", how, target)
    if args.backend == "openvino":
        yield from nncf_variants(source, floats, feeds, folder, args)


def nncf_variants(
    source: Path, floats: list[str], feeds: Sequence[Feed], folder: Path, args: argparse.Namespace
) -> Iterator[Variant]:
    """Yield NNCF's graphs, in OpenVINO's format."""
    leave = folder / "floats.json"
    nodes = onnx.load(source, load_external_data=False).graph.node
    leave.write_text(json.dumps([[node.name, *node.output] for node in nodes if node.name in floats]))
    peers = {
        "defaults": ("nncf.quantize(model, samples)", []),
        "transformer": ("model_type=TRANSFORMER", ["--transformer"]),
        "our layers": ("the layers ours quantizes", ["--leave", str(leave)]),
        "our layers, transformer": ("the same, model_type=TRANSFORMER", ["--leave", str(leave), "--transformer"]),
    }
    for name, (how, options) in peers.items():
        target = folder / f"nncf {name}.xml"
        if not target.exists():
            samples = write_samples(feeds, folder / "samples")
            script = Path(__file__).with_name("quantize_with_nncf.py")
            subprocess.run([nncf_python(args), script, source, samples, target, *options], check=True)
        yield Variant(f"nncf, {name}", how, target)


def digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def calibration_feeds(bundle: Bundle, settings: CalibrationSettings) -> list[Feed]:
    """Return the samples of the calibration: its requests, seeds and steps run again."""
    description = bundle.manifest.model
    graphs = {name: bundle.graph(name, "fp32") for name in pipeline_components(description)}
    recorded = run_trajectories(CalibrationModel(description, graphs, bundle.file), settings, ("unet",))
    return feeds_of(recorded, "unet", settings.samples)


def write_samples(feeds: Sequence[Feed], folder: Path) -> Path:
    """Write a file for each feed, for another process."""
    folder.mkdir(exist_ok=True)
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{index:05}.npz", **feed)
    return folder


def nncf_python(args: argparse.Namespace) -> str:
    """Return the Python with NNCF: as given, or of an environment that is created now."""
    if args.nncf:
        return str(args.nncf)
    folder = args.work / "venv"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "-q", *NNCF], check=True)
        (folder / ".ready").touch()
    return str(folder / "bin/python")


def draw(bundle: Bundle, graph: Path, backend: str, requests: list[ImageRequest], work: Path) -> Images:
    """Return one image per request, uint8 [requests, H, W, 3]; image i has seed i. Cached for the next run."""
    weights = graph.with_suffix(".bin")  # of OpenVINO's own format
    files = [sha256(file) for file in (graph, weights) if file.exists()]
    cache = work / f"{digest(files, backend, [json_fields(one) for one in requests], SAMPLING)[:16]}.npy"
    if cache.exists():
        return np.load(cache)
    arrays = list[Images]()
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend=backend) as pipeline:
        spec = bundle.manifest.components["unet"].spec
        backends = {**pipeline.backends, "unet": opened(graph, spec, backend)}
        changed = LatentDiffusionPipeline(pipeline.model, backends, bundle.file)
        guidance = {"guidance_scale": GUIDANCE} if prompts_of(requests) else {}
        for fields in track(list(batches(requests)), description=graph.stem, console=Console(stderr=True)):
            arrays += [np.asarray(image) for image in changed(**fields, **SAMPLING, **guidance).images]
    np.save(cache, np.stack(arrays))
    return np.stack(arrays)


def opened(graph: Path, spec: ComponentSpec, backend: str) -> Backend:
    """Open the UNet's graph on an engine; operations that are not int8 run in fp32."""
    if backend == "onnxruntime":
        return OnnxRuntimeBackend(graph, spec, "cpu")
    return OpenVinoBackend(graph, spec) if graph.suffix == ".onnx" else OpenVinoFormat(graph, spec)


def quality(images: Images, reference: Images, prompts: list[str] | None) -> dict[str, float | None]:
    """Return mean and worst PSNR in dB, and the prompt accuracy; None if all images are equal or without prompts."""
    pairs = zip(images.astype(np.float64), reference.astype(np.float64), strict=True)
    decibels = [value for one, other in pairs if (value := psnr(one, other, 255.0)) is not None]
    return {
        "psnr_mean": float(np.mean(decibels)) if decibels else None,
        "psnr_worst": min(decibels) if decibels else None,
        "correct": None if prompts is None else accuracy(list(images), prompts).overall.correct,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures as a table."""
    table = Table("UNet", "operations in int8", "PSNR mean, dB", "worst", "prompt accuracy")
    for row in rows:
        numbers = [row["psnr_mean"], row["psnr_worst"]]
        cells = ["–" if value is None else f"{value:.1f}" for value in numbers]
        share, correct = ("–" if row[name] is None else f"{row[name]:.1%}" for name in ("int8_share", "correct"))
        table.add_row(row["name"], share, *cells, correct)
    Console().print(table)


if __name__ == "__main__":
    logging.getLogger().setLevel(logging.ERROR)  # ONNX Runtime's advice to preprocess the graph
    main()
