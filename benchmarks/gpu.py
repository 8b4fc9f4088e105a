"""Measures speed and correctness of ONNX Runtime on an NVIDIA GPU, compared with torch on the same GPU.

``prepare`` needs no GPU. It builds the demo model's bundle and copies a full-size bundle without its weights, so that
the folder is small enough to be copied to a machine with a GPU:

    ldm-export build CONFIGS --random-weights --precision fp16 --target onnxruntime-cuda -o full
    python benchmarks/gpu.py prepare FOLDER --full full --configs CONFIGS

``run`` needs a GPU but no network. It prints the figures of each part as soon as they are measured: the limits of the
hardware; the demo model's images against those of the CPU; calls of a full-size UNet, in turns with torch; its kernels
by kind; steps and whole images for several numbers of images; memory; and the throughput of the batch scheduler.

    python benchmarks/gpu.py run FOLDER --json figures.json
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gpu_bundle import copy_without_weights, fill_with_random_weights
from gpu_loop import Alone, compared, mode_of, request, timed

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.cuda import Cuda
from ldm_runtime.backends.onnxruntime_launcher import Mode
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import LdmError
from ldm_runtime.images import psnr
from ldm_runtime.model import UNET
from ldm_runtime.request import Request

TOOLS = ("onnxruntime-gpu", "onnxruntime", "torch", "diffusers", "cuda-bindings", "nvidia-cudnn-cu13", "numpy")
PROMPT = "a small red circle left of a large blue square on a yellow background"
CASES: tuple[dict[str, Any], ...] = (
    {"guidance_scale": 6.0, "eta": 0.3},
    {"guidance_scale": 1.0, "eta": 0.3},
    {"guidance_scale": 6.0, "eta": 0.0},
    {"guidance_scale": 6.0, "eta": 0.3, "height": 96},
    {"guidance_scale": 6.0, "eta": 0.3, "images_per_prompt": 4},
)
"""Requests of the demo model whose images are compared with the CPU's."""
KINDS = (
    ("convolution", ("fprop", "conv2d", "convolve")),
    ("attention", ("sdpa", "fmha", "flash", "AddBiasUnpack")),
    ("matrix product", ("nvjet", "gemm", "cublas")),
    ("normalization", ("GroupNorm", "LayerNorm")),
    ("copy", ("Memset", "Memcpy", "Transpose", "Concat", "Split", "Resize")),
)
"""Kind of kernel -> parts of the names of its kernels; the first that matches counts."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    prepared = verbs.add_parser("prepare", help="write the folder that run measures; needs no GPU")
    prepared.add_argument("folder", type=Path)
    prepared.add_argument("--full", type=Path, required=True, help="full-size bundle of --target onnxruntime-cuda")
    prepared.add_argument("--configs", type=Path, required=True, help="its checkpoint, or the folder of its configs")
    measured = verbs.add_parser("run", help="measure on a GPU")
    measured.add_argument("folder", type=Path)
    measured.add_argument(
        "--rows", nargs="+", type=int, default=[2, 8, 32], help="rows of a UNet call (default 2 8 32)"
    )
    measured.add_argument(
        "--images", nargs="+", type=int, default=[1, 4, 16], help="images of a request (default 1 4 16)"
    )
    measured.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    measured.add_argument("--calls", type=int, default=20, help="timed UNet calls of a round (default 20)")
    measured.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    measured.add_argument("--compile-seconds", type=int, default=120, help="time limit of torch.compile (default 120)")
    measured.add_argument(
        "--autotune-seconds", type=int, default=0, help="time limit of its mode max-autotune (default 0: not measured)"
    )
    measured.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="parts to measure")
    measured.add_argument("--json", type=Path, help="write the figures here, after each part")
    args = parser.parse_args()
    try:
        prepare(args) if args.verb == "prepare" else measure(args)
    except LdmError as error:
        print(f"gpu.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Write the folder that ``measure`` takes."""
    from ldm_export.bundle.build import BuildOptions, build
    from ldm_export.demo import demo_checkpoint
    from ldm_export.families import open_checkpoint

    demo = args.folder / "demo"
    build(open_checkpoint(demo_checkpoint()), demo, options=BuildOptions("fp16", cuda=True))
    copy_without_weights(Bundle.open(args.full), args.folder / "full")
    shutil.copy(args.configs / "unet" / "config.json", args.folder / "unet.json")
    shutil.rmtree(args.folder / "cpu", ignore_errors=True)
    (args.folder / "cpu").mkdir()
    with LatentDiffusionPipeline.from_bundle(demo, backend="onnxruntime", precision="fp32", device="cpu") as pipeline:
        for number, case in enumerate(CASES):
            np.save(args.folder / "cpu" / f"{number}.npy", generated(pipeline, demo_request(case)))


def demo_request(case: dict[str, Any]) -> Request:
    """A request of the demo model with 20 steps."""
    return Request(PROMPT, seed=0, num_inference_steps=20, **case)


def generated(pipeline: LatentDiffusionPipeline, asked: Request) -> np.ndarray:
    """Images of a request, float32 [B, channels, H, W]."""
    *_, last = pipeline.steps(asked)
    return pipeline.decode_array(last.latents)


def measure(args: argparse.Namespace) -> None:
    """Measure each part, and add its figures under its name.

    Raises:
        BackendError: There is no GPU.
    """
    Cuda()
    fill_with_random_weights(args.folder / "full")
    figures: dict[str, Any] = {"tools": {name: found for name in TOOLS if (found := installed(name))}}
    for name in args.only:
        begun = time.perf_counter()
        figures[name] = {}
        try:
            for key, value in PARTS[name](args):
                figures[name][key] = value
                print(json.dumps({name: {key: value}}), flush=True)
        except Exception as error:  # the other parts are still measured
            figures[name]["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            print(json.dumps({name: figures[name]["error"]}), flush=True)
        figures[name]["took_s"] = round(time.perf_counter() - begun, 1)
        gc.collect()
        if args.json:
            args.json.write_text(json.dumps(figures, indent=1) + "\n")


Figures = Iterator[tuple[str, Any]]


def hardware(args: argparse.Namespace) -> Figures:
    """Name of the GPU, its arithmetic throughput and its memory bandwidth."""
    import torch
    from gpu_torch import copy_bandwidth, matrix_throughput

    yield "device", torch.cuda.get_device_name()
    yield "compute_capability", ".".join(map(str, torch.cuda.get_device_capability()))
    yield "fp16_tflops", round(matrix_throughput() / 1e12)
    yield "copy_tb_per_s", round(copy_bandwidth() / 1e12, 2)


def correctness(args: argparse.Namespace) -> Figures:
    """Compare the demo model's images with the CPU's in fp32: PSNR in dB, and the largest difference of a byte."""
    for precision in ("fp32", "fp16"):
        with LatentDiffusionPipeline.from_bundle(
            args.folder / "demo", backend="onnxruntime", precision=precision, device="cuda"
        ) as pipeline:
            results = []
            for number, case in enumerate(CASES):
                reference = np.load(args.folder / "cpu" / f"{number}.npy")
                arrays = generated(pipeline, demo_request(case))
                difference = np.abs(np.round(arrays * 255) - np.round(reference * 255)).max()
                results.append({"psnr": round(psnr(arrays, reference, 1.0) or 999, 1), "bytes": int(difference)})
            yield precision, results


def unet_call(args: argparse.Namespace) -> Figures:
    """Milliseconds of a full-size UNet call: the runtimes alternate, and each call waits for the GPU."""
    from gpu_torch import torch_calls

    full = args.folder / "full"
    for index, rows in enumerate(args.rows):
        limits = {} if index else {"reduce-overhead": args.compile_seconds, "max-autotune": args.autotune_seconds}
        known = {mode: limit for mode, limit in limits.items() if limit}
        calls, left_out = torch_calls(args.folder / "unet.json", rows, known)
        ours = Alone(Bundle.open(full), UNET, "fp16", rows, Mode.FREE, "cuda")
        calls["ldm-export"] = ours.run
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(args.rounds + 1):
            for name, call in calls.items():
                taken = seconds_of(call, args.calls)
                if number:
                    times[name] += taken
        figures = {name: round(1e3 * median(taken), 3) for name, taken in times.items()}
        figures["ldm-export, launched back to back"] = round(1e3 * ours.back_to_back(args.calls), 3)
        ours.close()
        yield f"{rows} rows", figures | ({"left out": left_out} if left_out else {})
        del calls
        gc.collect()


def seconds_of(call: Callable[[], None], count: int) -> list[float]:
    """Seconds of each of several calls."""
    taken = []
    for _ in range(count):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return taken


def kernels(args: argparse.Namespace) -> Figures:
    """Microseconds and launches of a UNet call by kind of kernel, without a CUDA graph."""
    import torch

    for rows in (args.rows[0], args.rows[-1]):
        opened = Alone(Bundle.open(args.folder / "full"), UNET, "fp16", rows, Mode.PLAIN, "cuda")
        for _ in range(3):
            opened.run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            opened.run()
        opened.close()
        spent: Counter[str] = Counter()
        launches: Counter[str] = Counter()
        for event in profile.events():
            if event.device_time:
                spent[kind_of(event.name)] += event.device_time
                launches[kind_of(event.name)] += 1
        yield f"{rows} rows", {kind: {"us": round(spent[kind]), "launches": launches[kind]} for kind in spent}


def kind_of(kernel: str) -> str:
    """Kind of a kernel by its name."""
    return next((kind for kind, parts in KINDS if any(part in kernel for part in parts)), "elementwise")


def images(args: argparse.Namespace) -> Figures:
    """Milliseconds of a step and of whole images, from the prompt to pixels, and the memory that stays in use."""
    for name in ("demo", "full"):
        bundle = Bundle.open(args.folder / name)
        with LatentDiffusionPipeline.from_bundle(
            bundle, backend="onnxruntime", precision="fp16", device="cuda"
        ) as pipeline:
            for count in args.images:
                figures = compared(pipeline, request(pipeline, count, 10)) | timed(pipeline, count, args)
                begun = time.perf_counter()
                generated(pipeline, request(pipeline, count, args.steps))
                figures["prompt_to_pixels_ms"] = round(1e3 * (time.perf_counter() - begun), 1)
                yield f"{name}, {count} images", figures
            yield f"{name}, mode", mode_of(pipeline)
            assert pipeline.loop is not None
            yield f"{name}, memory_mib", {key: size >> 20 for key, size in pipeline.loop.memory().items()}


def throughput(args: argparse.Namespace) -> Figures:
    """Images per second of the batch scheduler with 16 requests of one image, against one call after the other."""
    with LatentDiffusionPipeline.from_bundle(
        args.folder / "full", backend="onnxruntime", precision="fp16", device="cuda"
    ) as pipeline:
        count, asked = 16, request(pipeline, 1, args.steps)
        generated(pipeline, asked)  # loads the components and captures their calls
        begun = time.perf_counter()
        for _ in range(3):
            generated(pipeline, asked)
        yield "one after the other", round(3 / (time.perf_counter() - begun), 2)
        with BatchScheduler(pipeline, Limits(max_rows=32, row_buckets=[2, 8, 32])) as scheduler:
            for kind in ("first", "second"):
                begun = time.perf_counter()
                for job in [scheduler.submit(asked) for _ in range(count)]:
                    job.result()
                yield f"in flight, {kind}", round(count / (time.perf_counter() - begun), 2)


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    part.__name__: part for part in (hardware, correctness, images, throughput, kernels, unet_call)
}


def installed(name: str) -> str | None:
    """Version of a package, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
