"""The task of every peer and its inputs: one UNet call, or whole images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MIDDLE = 500
Command = dict[str, Any]
Step = Callable[[np.ndarray, int, np.ndarray], np.ndarray]
"""sample float32 [R, 4, h, w], timestep, context float32 [R, T, D] → predicted noise float32 [R, 4, h, w]."""


def step_inputs(command: Command) -> tuple[np.ndarray, int, np.ndarray]:
    """Inputs of one UNet call: 2 × batch rows, as guidance has them."""
    rng, rows = np.random.default_rng(command["seed"]), 2 * command["batch"]
    sample = rng.standard_normal((rows, *command["latent"])).astype(np.float32)
    return sample, MIDDLE, rng.standard_normal((rows, *command["context"])).astype(np.float32)


def latents(command: Command) -> np.ndarray:
    """Starting noise of the images, float32 [batch, 4, h, w]."""
    rng = np.random.default_rng(command["seed"])
    return rng.standard_normal((command["batch"], *command["latent"])).astype(np.float32)


class Task:
    """One peer's work: ``step`` is its UNet; ``draw`` gives PIL images of a command's prompts, from ``latents``, with
    guidance and without noise in the steps."""

    def __init__(self, step: Step, draw: Callable[[Command], Any]):
        self._step, self._draw, self._last = step, draw, np.zeros(0)

    def ready(self, command: Command) -> Callable[[], object]:
        """The call to time; ``what`` "save" writes the last result to ``path``."""
        if command["what"] == "save":
            return lambda: np.save(Path(command["path"]), self._last)
        if command["what"] == "unet":
            inputs = step_inputs(command)
            return lambda: self._keep(self._step(*inputs))
        return lambda: self._keep([np.asarray(image) for image in self._draw(command)])

    def _keep(self, result: Any) -> None:
        self._last = np.asarray(result)
