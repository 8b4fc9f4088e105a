"""What every process of ``peers.py`` computes, and from which inputs: one UNet call, or whole images."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MIDDLE = 500
Command = dict[str, Any]
Step = Callable[[np.ndarray, int, np.ndarray], np.ndarray]
"""sample float32 [R, 4, h, w], timestep, context float32 [R, T, D] → predicted noise float32 [R, 4, h, w]."""


def step_inputs(command: Command) -> tuple[np.ndarray, int, np.ndarray]:
    """Return the inputs of one UNet call: 2 × batch rows, for guidance."""
    rng, rows = np.random.default_rng(command["seed"]), 2 * command["batch"]
    sample = rng.standard_normal((rows, *command["latent"])).astype(np.float32)
    return sample, MIDDLE, rng.standard_normal((rows, *command["context"])).astype(np.float32)


def latents(command: Command) -> np.ndarray:
    """Return the initial latents, float32 [batch, 4, h, w]."""
    rng = np.random.default_rng(command["seed"])
    return rng.standard_normal((command["batch"], *command["latent"])).astype(np.float32)


class Task:
    """Task of one runtime: ``step`` calls its UNet; ``draw`` returns PIL images of a command's prompts.

    Images start from ``latents``, with guidance and with eta 0. An answer has the CPU seconds of all threads, which
    depend less on other work of the machine than seconds do.
    """

    def __init__(self, step: Step, draw: Callable[[Command], Any]):
        self._step, self._draw, self._last = step, draw, np.zeros(0)

    def ready(self, command: Command) -> Callable[[], object]:
        """Return the call to time; ``what`` "save" writes the last result to ``path``."""
        if command["what"] == "save":
            return lambda: np.save(Path(command["path"]), self._last)
        if command["what"] == "unet":
            inputs = step_inputs(command)
            return lambda: self._keep(lambda: self._step(*inputs))
        return lambda: self._keep(lambda: [np.asarray(image) for image in self._draw(command)])

    def _keep(self, call: Callable[[], Any]) -> Command:
        begun = time.process_time()
        self._last = np.asarray(call())
        return {"cpu_seconds": time.process_time() - begun}
