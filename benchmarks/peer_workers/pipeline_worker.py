"""Process of ``peers.py`` that runs Stable Diffusion with optimum's own pipelines.

ORTStableDiffusionPipeline runs ONNX Runtime in fp32 with default session options. OVStableDiffusionPipeline runs
OpenVINO in bf16, compiled for fixed shapes, with a hint for latency.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from task import Command, Task, latents

from ldm_export.bench.worker_process import serve_commands


def onnxruntime_pipeline(folder: Path, threads: int) -> Any:
    """Load a pipeline of optimum-onnx."""
    from optimum.onnxruntime import ORTStableDiffusionPipeline

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return ORTStableDiffusionPipeline.from_pretrained(folder, export=False, session_options=options)


def openvino_pipeline(folder: Path, threads: int) -> Any:
    """Load a pipeline of optimum-intel, which is not compiled yet."""
    from optimum.intel import OVStableDiffusionPipeline

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": str(threads),
        "CACHE_DIR": "",
    }
    return OVStableDiffusionPipeline.from_pretrained(folder, export=False, compile=False, ov_config=options)


def start(settings: Command) -> tuple[Callable[[Command], Callable[[], object]], Command]:
    """Settings: engine ("onnxruntime" or "openvino"), models (folder of the exports), threads."""
    torch.set_num_threads(settings["threads"])
    engine = settings["engine"]
    load = {"onnxruntime": onnxruntime_pipeline, "openvino": openvino_pipeline}[engine]
    pipeline = load(Path(settings["models"]) / f"pipeline-{engine}", settings["threads"])
    pipeline.set_progress_bar_config(disable=True)
    shapes: set[tuple[int, int, int]] = set()

    def draw(command: Command) -> Any:
        height, width = (8 * side for side in command["latent"][1:])
        if engine == "openvino" and (shape := (command["batch"], height, width)) not in shapes:
            shapes.add(shape)
            pipeline.reshape(*shape, num_images_per_prompt=1)
            pipeline.compile()
        return pipeline(
            command["prompts"],
            height=height,
            width=width,
            guidance_scale=command["guidance"],
            num_inference_steps=command["steps"],
            latents=torch.from_numpy(latents(command)),
        ).images

    def step(*inputs: Any) -> Any:
        raise ValueError("a pipeline of optimum generates whole images only; give --what image")

    package = {"onnxruntime": "optimum-onnx", "openvino": "optimum-intel"}[engine]
    return Task(step, draw).ready, {"tools": {name: version(name) for name in (engine, package, "diffusers", "torch")}}


if __name__ == "__main__":
    serve_commands(start)
