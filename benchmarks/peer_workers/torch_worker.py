"""Process of ``peers.py`` that runs diffusers on torch: eager or compiled, in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from reference_pipeline import draw, load, pipeline
from task import Command, Task

from ldm_export.bench.worker_process import serve_commands


def start(settings: Command) -> tuple[Callable[[Command], Callable[[], object]], Command]:
    """Settings: checkpoint, dtype, compile, images (load the other components too), threads."""
    torch.set_num_threads(settings["threads"])
    checkpoint, dtype = Path(settings["checkpoint"]), getattr(torch, settings["dtype"])
    modules = {
        name: load(checkpoint, name, dtype) for name in ("unet", "bert", "vqvae")[: 3 if settings["images"] else 1]
    }
    forward = modules["unet"].forward
    if settings["compile"]:
        forward = torch.compile(forward, dynamic=False)

    def unet(sample: torch.Tensor, timestep: torch.Tensor | int, context: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return forward(sample.to(dtype), timestep, context.to(dtype), return_dict=False)[0].float()

    def step(sample: np.ndarray, timestep: int, context: np.ndarray) -> np.ndarray:
        return unet(torch.from_numpy(sample), torch.tensor(timestep), torch.from_numpy(context)).numpy()

    reference = None
    if settings["images"]:
        reference = pipeline(
            checkpoint,
            lambda tokens: modules["bert"](tokens)[0].float(),
            unet,
            lambda latents: modules["vqvae"].decode(latents.to(dtype)).sample.float(),
        )
    tools = {name: version(name) for name in ("torch", "diffusers")}
    return Task(step, partial(draw, reference)).ready, {"tools": tools}


if __name__ == "__main__":
    serve_commands(start)
