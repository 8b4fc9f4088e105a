"""Time of a denoising step and of a whole image on a GPU: TensorRT and ONNX Runtime against torch.

The runtimes alternate, so that other load on the GPU affects all of them. The lower bound of a step is the time in
which the GPU can read the UNet's weights once, from the bandwidth measured here. --device cpu tests the script.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import LdmError
from ldm_runtime.request import Request

PROMPT = "a small red circle left of a large blue square on a yellow background"
OPTIONS = {"eta": 0.3, "guidance_scale": 6.0}
TOOLS = ("tensorrt-rtx", "tensorrt", "onnxruntime-gpu", "onnxruntime", "torch", "diffusers", "cuda-python", "numpy")
COPIED, COPIES = 2**30, 20  # bytes moved to measure the bandwidth, and how often
Timed = Callable[[], dict[str, float]]
"""Runs once and returns the seconds of a step and of a whole call."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="built with --precision fp16 and, for tensorrt, with engines")
    parser.add_argument("--checkpoint", type=Path, help="of torch (default: the demo model; none: no torch)")
    parser.add_argument("--random-weights", action="store_true", help="the checkpoint is configs only")
    parser.add_argument("--backends", nargs="+", default=["tensorrt", "onnxruntime"], help="of the bundle")
    parser.add_argument("--precision", default="fp16", help="of the bundle's graphs, and of torch (default fp16)")
    parser.add_argument("--images", type=int, default=1, help="of one call (default 1)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds after one that is not (default 10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    try:
        facts = measure(args)
    except LdmError as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        return 1
    show(facts)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return all figures; raises LdmError if there is no GPU or the bundle cannot be read."""
    cuda = Cuda() if args.device == "cuda" else None
    bundle = Bundle.open(args.bundle)
    runs: dict[str, Timed] = {}
    left_out: dict[str, str] = {}
    for backend in args.backends:
        try:
            runs[backend] = ours(bundle, backend, args)
        except LdmError as error:
            left_out[backend] = str(error)
    if str(args.checkpoint) != "none":
        try:
            runs |= theirs(args)
        except (LdmError, ImportError) as error:
            left_out["torch"] = str(error)
    seconds: dict[str, dict[str, list[float]]] = {name: {"step": [], "image": []} for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            timings = run()
            if number:  # the first round compiles, captures and fills caches
                for what, value in timings.items():
                    seconds[name][what].append(value)
    files = bundle.manifest.files
    graph = bundle.manifest.components["unet"].graphs[args.precision]
    weights = sum(files[name].size for name in (graph, f"{graph}.data") if name in files)
    bandwidth = None if cuda is None else measured_bandwidth(cuda)
    return {
        "device": "cpu" if cuda is None else device_name(cuda),
        "compute_capability": None if cuda is None else cuda.capability(),
        "machine": platform.processor() or platform.machine(),
        "tools": {name: version for name in TOOLS if (version := installed(name))},
        "settings": {"precision": args.precision, "images": args.images, "steps": args.steps, "rounds": args.rounds},
        "seconds": {
            name: {what: {"median": median(v), "min": min(v), "max": max(v)} for what, v in parts.items()}
            for name, parts in seconds.items()
        },
        "floor": None if bandwidth is None else {"bytes_per_second": bandwidth, "step": weights / bandwidth},
        "left_out": left_out,
        "engines_for_other_gpus": None if cuda is None else loads_elsewhere(bundle, cuda),
    }


def ours(bundle: Bundle, backend: str, args: argparse.Namespace) -> Timed:
    """Return a run of the bundle's pipeline. Each run has a new prompt, whose encoding counts for the image."""
    device = args.device if backend == "onnxruntime" else "auto"
    pipeline = LatentDiffusionPipeline.from_bundle(bundle, backend=backend, precision=args.precision, device=device)
    prompts = (f"{PROMPT} {number}" for number in count())

    def run() -> dict[str, float]:
        options = {"seed": 0, "num_inference_steps": args.steps, "images_per_prompt": args.images, **OPTIONS}
        request = Request(next(prompts), **options)
        begun = time.perf_counter()
        pipeline.condition(pipeline.plan(request))
        encoded = time.perf_counter()
        *_, last = pipeline.steps(request)
        latents = last.latents  # waits for the device
        denoised = time.perf_counter()
        pipeline.decode(latents)
        return {"step": (denoised - encoded) / args.steps, "image": time.perf_counter() - begun}

    run()  # loads the engine, and fails here if it cannot run
    return run


def theirs(args: argparse.Namespace) -> dict[str, Timed]:
    """Return runs of diffusers' pipeline on the same device, eager and with its UNet compiled."""
    import torch

    from ldm_export.demo import demo_checkpoint
    from ldm_export.families import family_named, open_checkpoint
    from ldm_runtime.errors import BackendError

    if args.device == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} finds no CUDA device; install a CUDA build of it")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
    dtype = dtype if args.device == "cuda" else torch.float32
    checkpoint = open_checkpoint(args.checkpoint or demo_checkpoint(), random_weights=args.random_weights)
    pipeline = family_named(checkpoint.family).reference(checkpoint).to(args.device, dtype)
    unets = {"torch eager": pipeline.unet, "torch.compile": torch.compile(pipeline.unet, mode="max-autotune")}
    if args.device == "cpu":
        unets.pop("torch.compile")

    def wait() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    def timed(unet: Any) -> Timed:
        def run() -> dict[str, float]:
            pipeline.unet = unet
            rows = 2 * args.images
            sample = torch.randn(rows, *sample_shape(pipeline.unet), device=args.device, dtype=dtype)
            context = torch.randn(rows, 77, unet.config.cross_attention_dim, device=args.device, dtype=dtype)
            timesteps = torch.arange(args.steps, 0, -1, device=args.device)
            with torch.inference_mode():
                wait()
                begun = time.perf_counter()
                for timestep in timesteps:
                    unet(sample, timestep, encoder_hidden_states=context)
                wait()
                stepped = time.perf_counter() - begun
                generator = torch.Generator(args.device).manual_seed(0)
                begun = time.perf_counter()
                pipeline([PROMPT] * args.images, generator=generator, num_inference_steps=args.steps, **OPTIONS)
                wait()
            return {"step": stepped / args.steps, "image": time.perf_counter() - begun}

        return run

    return {name: timed(unet) for name, unet in unets.items()}


def sample_shape(unet: Any) -> tuple[int, int, int]:
    """Return channels, height and width of the latents a UNet was trained on."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def measured_bandwidth(cuda: Cuda) -> float:
    """Return the bytes per second of a copy within the GPU's memory, which reads and writes each byte."""
    source, target = (cuda.call("cudaMalloc", COPIED) for _ in range(2))
    stream = cuda.call("cudaStreamCreate")
    try:
        cuda.move(int(source), int(target), COPIED, stream)
        cuda.call("cudaStreamSynchronize", stream)
        begun = time.perf_counter()
        for _ in range(COPIES):
            cuda.move(int(source), int(target), COPIED, stream)
        cuda.call("cudaStreamSynchronize", stream)
        return 2 * COPIED * COPIES / (time.perf_counter() - begun)
    finally:
        for address in (source, target):
            cuda.call("cudaFree", address)
        cuda.call("cudaStreamDestroy", stream)


def loads_elsewhere(bundle: Bundle, cuda: Cuda) -> dict[str, Any] | None:
    """Try to load the UNet's engine on this GPU although it was built for others, e.g. an 8.0 engine on 9.0."""
    from ldm_runtime.backends.engine_match import open_package

    engines = [one for one in bundle.manifest.components["unet"].engines if one.compute_capabilities]
    if not engines or cuda.capability() in engines[0].compute_capabilities:
        return None
    package = open_package(engines)
    runtime = package.Runtime(package.Logger(package.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(bundle.file(engines[0].file).read_bytes())
    context = None if engine is None else engine.create_execution_context()
    return {
        "built_for": list(engines[0].compute_capabilities),
        "this_gpu": cuda.capability(),
        "loads": engine is not None,
        "makes_a_context": context is not None,
    }


def device_name(cuda: Cuda) -> str:
    """Return the GPU's name."""
    name = cuda.call("cudaGetDeviceProperties", 0).name
    return name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)


def installed(name: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def show(facts: dict[str, Any]) -> None:
    table = Table("", "step, ms", "image, ms", "of the lower bound", title=facts["device"])
    floor = facts["floor"] and facts["floor"]["step"]
    for name, parts in facts["seconds"].items():
        step, image = (parts[what]["median"] for what in ("step", "image"))
        table.add_row(name, f"{step * 1e3:.3f}", f"{image * 1e3:.1f}", f"{step / floor:.2f}×" if floor else "")
    if floor:
        table.add_row("reading the weights once", f"{floor * 1e3:.3f}", "", "1.00×")
    Console().print(table)
    for name, reason in facts["left_out"].items():
        Console(stderr=True).print(f"left out: {name}: {reason}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
