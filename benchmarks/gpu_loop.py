"""Measures a denoising step with ONNX Runtime on a GPU: a UNet call alone, and a step of the denoising loop.

The time of a step is the difference between a long and a short run divided by their difference in steps, so it includes
neither the start nor the transfer of the latents. The UNet calls alone are launched without waiting for each other.
Before the loop is timed, its result is compared with that of the loop in NumPy. The script needs no network, and only
the runtime with the extra "gpu". --device cpu tries it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.backends.engine import Choice, Placement, step_graphs
from ldm_runtime.backends.memory import HostMemory, memory_of
from ldm_runtime.backends.onnxruntime import OnnxRuntimeEngine
from ldm_runtime.backends.onnxruntime_launcher import Mode, OnnxRuntimeLauncher
from ldm_runtime.bundle import Bundle
from ldm_runtime.device import Call, Workspace
from ldm_runtime.device_loop import GUIDED_STEP, STEP, DeviceLoop, slots_of
from ldm_runtime.device_run import LoopDevice
from ldm_runtime.errors import LdmError
from ldm_runtime.images import psnr
from ldm_runtime.model import NOISE_PRED, SAMPLE, UNET
from ldm_runtime.request import Request
from ldm_runtime.specs import sizes_of

SHORT = 10
"""Steps of the short run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--precisions", nargs="+", default=["fp16", "fp32"], help="precisions to measure (default: fp16 fp32)"
    )
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4], help="images of one call (default: 1 4)")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of the long run (default 50)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    results = []
    for precision in args.precisions:
        try:
            results += measure(Bundle.open(args.bundle), precision, args)
        except LdmError as error:
            results.append({"precision": precision, "error": str(error)})
            print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(any("error" in result for result in results))


def measure(bundle: Bundle, precision: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of one precision for each number of images; seconds are in milliseconds."""
    results = []
    started = time.perf_counter()
    with LatentDiffusionPipeline.from_bundle(
        bundle, backend="onnxruntime", precision=precision, device=args.device
    ) as pipeline:
        if pipeline.loop is None:
            pipeline.loop = host_loop(bundle, precision)
        for images in args.images:
            figures: dict[str, Any] = {"precision": precision, "images": images, "device": args.device}
            try:
                figures |= compared(pipeline, request(pipeline, images, SHORT))
                figures["first_image_s"] = round(time.perf_counter() - started, 2)
                figures |= timed(pipeline, images, args)
                figures["memory_mib"] = {name: round(size / 2**20) for name, size in pipeline.loop.memory().items()}
                figures["unet_mode"] = mode_of(pipeline)
                plan = pipeline.plan(request(pipeline, images, SHORT))
                for mode in Mode:
                    figures[f"unet_{mode.name.lower()}_ms"] = alone(bundle, UNET, precision, plan.rows, mode, args)
                step = GUIDED_STEP if plan.guided else STEP
                figures["step_graph_ms"] = alone(bundle, step, "fp32", plan.rows, Mode.FREE, args)
            except LdmError as error:
                figures["error"] = str(error)
            print(json.dumps(figures), flush=True)
            results.append(figures)
    return results


def request(pipeline: LatentDiffusionPipeline, images: int, steps: int) -> Request:
    """A request with noise at each step, guided if the model can be."""
    fields = pipeline.example()
    count = {"images_per_prompt": images} if "prompts" in fields else {}
    scale = 6.0 if pipeline.model.guidance else 1.0
    return Request(**fields, **count, seed=3, eta=0.3, guidance_scale=scale, num_inference_steps=steps)


def compared(pipeline: LatentDiffusionPipeline, sampled: Request) -> dict[str, Any]:
    """Compare with the NumPy loop: PSNR of the image in dB (None if equal), and relative difference of the latents."""
    loop, latents = pipeline.loop, []
    for one in (loop, None):
        pipeline.loop = one
        *_, last = pipeline.steps(sampled)
        latents.append(last.latents)
    pipeline.loop = loop
    image, reference = (np.asarray(pipeline.generation(each, sampled).images[0], np.float64) for each in latents)
    return {
        "image_psnr": psnr(image, reference, 255.0),
        "latents_difference": float(np.abs(latents[0] - latents[1]).max() / np.abs(latents[1]).max()),
    }


def timed(pipeline: LatentDiffusionPipeline, images: int, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step and of a whole image."""
    seconds: dict[int, list[float]] = {SHORT: [], args.steps: []}
    whole, launching = [], []
    for number in range(args.rounds + 1):
        for steps, times in seconds.items():
            sampled = request(pipeline, images, steps)
            begun = time.perf_counter()
            *_, last = pipeline.steps(sampled)
            launched = time.perf_counter()
            latents = last.latents  # waits for the device
            denoised = time.perf_counter()
            pipeline.decode_array(latents)
            if number:
                times.append(denoised - begun)
                if steps == args.steps:
                    whole.append(time.perf_counter() - begun)
                    launching.append((launched - begun) / steps)
    step = (median(seconds[args.steps]) - median(seconds[SHORT])) / (args.steps - SHORT)
    return {
        "loop_step_ms": round(1e3 * step, 4),
        "launching_a_step_ms": round(1e3 * median(launching), 4),
        "loop_ms": round(1e3 * median(seconds[args.steps]), 3),
        "image_ms": round(1e3 * median(whole), 3),
    }


def mode_of(pipeline: LatentDiffusionPipeline) -> str:
    """How the pipeline's UNet runs."""
    backend = pipeline.backends[UNET].load()  # type: ignore[attr-defined]
    return backend.launcher.mode.name if hasattr(backend, "launcher") else "CPU"


def alone(
    bundle: Bundle, component: str, precision: str, rows: int, mode: Mode, args: argparse.Namespace
) -> float | str:
    """Milliseconds of a call among calls that are launched back to back, or why it cannot run in this mode."""
    try:
        opened = Alone(bundle, component, precision, rows, mode, args.device)
    except LdmError as error:
        return str(error)
    times = [opened.back_to_back(args.steps) for _ in range(args.rounds + 1)]
    opened.close()
    return round(1e3 * median(times[1:]), 4)


class Alone:
    """A component with random inputs on a device.

    Raises:
        LdmError: It cannot run in this mode.
    """

    def __init__(self, bundle: Bundle, component: str, precision: str, rows: int, mode: Mode, device: str):
        self._component, self._memory = component, memory_of(device, "gpu")
        loader = OnnxRuntimeEngine().open(bundle, component, choice(precision, device), Placement(device))
        self._launcher = OnnxRuntimeLauncher(loader.graph, loader.spec, self._memory, half=loader.half, modes=(mode,))
        spec = self._launcher.spec
        images = rows // 2 if component == GUIDED_STEP else rows
        doubled = {SAMPLE, NOISE_PRED} if component == GUIDED_STEP else ()
        shapes = {one.name: (rows if one.name in doubled else images, *one.bounds("opt")[1:]) for one in spec.inputs}
        sizes = sizes_of(spec, shapes)
        tensors = {one.name: (one.shape_at(sizes), one.dtype) for one in (*spec.inputs, *spec.outputs)}
        self._space = Workspace(self._memory, tensors, {component: Call(self._launcher, {})}, "benchmark")
        generator = np.random.default_rng(0)
        for one in spec.inputs:
            values = generator.standard_normal(tensors[one.name][0]) * 0.5
            whole = np.abs(values) * 500
            self._space.write(one.name, (values if one.dtype.startswith("float") else whole).astype(one.dtype))

    def launch(self) -> None:
        """Run the component; it may still run on return."""
        self._space.run(self._component)

    def run(self) -> None:
        """Run the component to its end."""
        self.launch()
        self._memory.synchronise()

    def back_to_back(self, count: int) -> float:
        """Seconds of a call among some that do not wait for each other."""
        self._memory.synchronise()
        begun = time.perf_counter()
        for _ in range(count):
            self.launch()
        self._memory.synchronise()
        return (time.perf_counter() - begun) / count

    def close(self) -> None:
        """Free its memory."""
        self._space.close()
        self._launcher.close()


def choice(precision: str, device: str) -> Choice:
    """ONNX Runtime on a device."""
    return Choice("onnxruntime", device, precision, precision, 0, "benchmark")


def host_loop(bundle: Bundle, precision: str) -> DeviceLoop:
    """The loop of a device with memory of the host."""
    model, engine, memory = bundle.manifest.model, OnnxRuntimeEngine(), HostMemory()
    steps = step_graphs(model)
    derived = [spec.name for runs in ("request", "schedule") for spec in model.once_per(runs)]
    opened = {}
    for name in (UNET, *steps, *derived):
        part = choice("fp32" if name in steps else precision, "cpu")
        loader = engine.open(bundle, name, part, Placement("cpu"))
        opened[name] = OnnxRuntimeLauncher(loader.graph, loader.spec, memory)
    slots = slots_of(opened[steps[0]].spec)
    return DeviceLoop(lambda: LoopDevice(memory, opened, frozenset(derived)), slots)


if __name__ == "__main__":
    sys.exit(main())
