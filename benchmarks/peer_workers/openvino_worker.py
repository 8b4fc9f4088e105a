"""Process of ``peers.py`` that runs models of optimum-intel in OpenVINO.

It compiles them for fixed shapes and runs them as optimum's pipelines do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from reference_pipeline import draw, pipeline
from task import Command, Task

from ldm_export.bench.worker_process import serve_commands


class Compiled:
    """A model that is compiled again when the shapes of its inputs change, as ``OVPipeline.reshape`` does."""

    def __init__(self, core: openvino.Core, model: Path, options: dict[str, Any]):
        self._core, self._model, self._options, self._shapes = core, core.read_model(model), options, None

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Return the first output."""
        shapes = [list(array.shape) for array in arrays]
        if shapes != self._shapes:
            ports = [port.get_any_name() for port in self._model.inputs]
            self._model.reshape(dict(zip(ports, shapes, strict=True)))
            self._compiled = self._core.compile_model(self._model, "CPU", self._options)
            self._shapes = shapes
        return self._compiled(list(arrays), share_inputs=True)[0]


def start(settings: Command) -> tuple[Callable[[Command], Callable[[], object]], Command]:
    """Settings: checkpoint (configs, tokenizer), models (folder), unet (file in it), precision, images, threads."""
    torch.set_num_threads(settings["threads"])
    core, folder = openvino.Core(), Path(settings["models"])
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": settings["precision"],
        "INFERENCE_NUM_THREADS": settings["threads"],
    }
    unet = Compiled(core, folder / settings["unet"], options)

    def step(sample: np.ndarray, timestep: int, context: np.ndarray) -> np.ndarray:
        return unet(sample, np.full(len(sample), timestep, np.int64), context)

    reference = None
    if settings["images"]:
        bert, decoder = (Compiled(core, folder / f"{name}.xml", options) for name in ("bert", "decoder"))
        reference = pipeline(
            Path(settings["checkpoint"]),
            lambda tokens: torch.from_numpy(bert(tokens.numpy())),
            lambda sample, timestep, context: torch.from_numpy(step(sample.numpy(), int(timestep), context.numpy())),
            lambda latents: torch.from_numpy(decoder(latents.numpy())),
        )
    tools = {name: version(name) for name in ("openvino", "optimum-intel", "nncf", "torch")}
    return Task(step, partial(draw, reference)).ready, {"tools": tools}


if __name__ == "__main__":
    serve_commands(start)
