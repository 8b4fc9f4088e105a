"""Process of ``peers.py`` that runs graphs of optimum-onnx in ONNX Runtime.

It runs them as optimum's pipelines do: in a session with default options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from reference_pipeline import draw, pipeline
from task import Command, Task

from ldm_export.bench.worker_process import serve_commands


def start(settings: Command) -> tuple[Callable[[Command], Callable[[], object]], Command]:
    """Settings: checkpoint (configs and tokenizer), graphs (their folder), images, threads."""
    torch.set_num_threads(settings["threads"])
    names = ("unet", "bert", "decoder")[: 3 if settings["images"] else 1]
    folder = Path(settings["graphs"])
    sessions = {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        for name in names
    }

    def run(name: str, *arrays: np.ndarray) -> np.ndarray:
        ports = sessions[name].get_inputs()
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        feed = {port.name: array.astype(kinds[port.type]) for port, array in zip(ports, arrays, strict=True)}
        return sessions[name].run(None, feed)[0]

    def step(sample: np.ndarray, timestep: int, context: np.ndarray) -> np.ndarray:
        return run("unet", sample, np.array(timestep, np.int64), context)

    reference = None
    if settings["images"]:
        reference = pipeline(
            Path(settings["checkpoint"]),
            lambda tokens: torch.from_numpy(run("bert", tokens.numpy())),
            lambda sample, timestep, context: torch.from_numpy(step(sample.numpy(), int(timestep), context.numpy())),
            lambda latents: torch.from_numpy(run("decoder", latents.numpy())),
        )
    tools = {name: version(name) for name in ("onnxruntime", "optimum-onnx", "torch")}
    return Task(step, partial(draw, reference)).ready, {"tools": tools}


if __name__ == "__main__":
    serve_commands(start)
