"""Schedulers in NumPy: they read options by diffusers' names and compute trajectories.

A scheduler is a module with a class that implements ``Scheduler``, and a line in ``SCHEDULERS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from ldm_runtime.errors import SpecError
from ldm_runtime.number_checks import shown
from ldm_runtime.schedulers.ddim import DDIM
from ldm_runtime.schedulers.ddpm import DDPM
from ldm_runtime.schedulers.dpm_solver import DPMSolverMultistep
from ldm_runtime.schedulers.euler import Euler
from ldm_runtime.schedulers.euler_ancestral import EulerAncestral
from ldm_runtime.schedulers.heun import Heun
from ldm_runtime.schedulers.lcm import LCM
from ldm_runtime.schedulers.lms import LMS
from ldm_runtime.schedulers.pndm import PNDM
from ldm_runtime.schedulers.tcd import TCD
from ldm_runtime.schedulers.trajectory import Clip, Threshold, Trajectory
from ldm_runtime.schedulers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "LCM",
    "LMS",
    "PNDM",
    "SCHEDULERS",
    "TCD",
    "Clip",
    "DPMSolverMultistep",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Scheduler",
    "Threshold",
    "Trajectory",
    "UniPC",
    "scheduler_from_config",
]


class Scheduler(Protocol):
    """Interface of a scheduler: options of a sampling method, and the trajectories computed from them."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a parsed scheduler_config.json or the result of ``to_config``; "class" and keys in "_" are ignored.

        Raises:
            SpecError: A key or a value is not supported.
        """
        ...

    def to_config(self) -> dict[str, Any]:
        """Return every option, ready for JSON, and the class name of diffusers as "class"."""
        ...

    @property
    def num_train_timesteps(self) -> int:
        """Number of timesteps that the model was trained with."""
        ...

    def trajectory(self, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the UNet calls of ``num_inference_steps`` steps. Methods without eta ignore it.

        Raises:
            SpecError: An argument is out of range, or the options give no finite trajectory for it.
        """
        ...

    def trajectory_after(self, steps: int, num_inference_steps: int, eta: float = 0.0) -> Trajectory:
        """Compute the trajectory without its first ``steps`` steps, for latents that start from an image.

        Raises:
            SpecError: As ``trajectory``.
        """
        ...


SCHEDULERS: dict[str, type[Scheduler]] = {
    DDIM.CLASS: DDIM,
    PNDM.CLASS: PNDM,
    DPMSolverMultistep.CLASS: DPMSolverMultistep,
    Euler.CLASS: Euler,
    EulerAncestral.CLASS: EulerAncestral,
    DDPM.CLASS: DDPM,
    LMS.CLASS: LMS,
    Heun.CLASS: Heun,
    UniPC.CLASS: UniPC,
    LCM.CLASS: LCM,
    TCD.CLASS: TCD,
}


def scheduler_from_config(config: Mapping[str, Any]) -> Scheduler:
    """Create the scheduler of the diffusers class that ``config["class"]`` names, with the options in ``config``.

    Raises:
        SpecError: The class is missing or unknown; a key or a value is not supported.
    """
    if not isinstance(config, Mapping):
        raise SpecError(f"scheduler: got {shown(config)}, expected an object of options")
    name = config.get("class")
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise SpecError(f"scheduler: class: got {shown(name)}, expected one of {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name].from_config(config)
