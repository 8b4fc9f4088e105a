"""Checks that a scheduler samples correctly in a family's pipeline: not all pipelines of diffusers scale latents.

Schedulers in sigmas multiply the initial noise by ``init_noise_sigma`` and scale the model's input
(``scale_model_input``). diffusers' LDMTextToImagePipeline does neither. LDMSuperResolutionPipeline also scales the
conditioning image. LDMPipeline multiplies the noise by the sigma of training, before the number of steps is set. A
scheduler is refused if diffusers would generate wrong images with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers import SCHEDULERS, Scheduler
from ldm_runtime.schedulers.sigma_schedule import SigmaSchedule
from ldm_runtime.schedulers.trajectory import Trajectory

__all__ = ["check_family_scheduler"]

UNSCALED: Mapping[str, str] = {
    "text_to_image": "LDMTextToImagePipeline does not scale the latents",
    "super_resolution": "LDMSuperResolutionPipeline scales the image to enlarge too",
}
"""Family -> reason why it takes no scheduler in sigmas."""
SCALED_AS_TRAINED: Mapping[str, str] = {"unconditional": "LDMPipeline takes the sigma of training"}
"""Family -> reason why it takes only schedulers whose initial noise does not depend on the number of steps."""


def check_family_scheduler(family: str, scheduler: Scheduler, trajectory: Trajectory) -> None:
    """Check that a family's pipeline in diffusers samples a trajectory correctly.

    Args:
        family: Name of the family.
        scheduler: Scheduler.
        trajectory: A trajectory of this scheduler.

    Raises:
        SpecError: It does not; the message names the scheduler and those that are possible.
    """
    if not isinstance(scheduler, SigmaSchedule):
        return
    if family in UNSCALED:
        possible = ", ".join(name for name, one in SCHEDULERS.items() if not issubclass(one, SigmaSchedule))
        raise SpecError(f"scheduler: got {scheduler.CLASS}, but diffusers' {UNSCALED[family]}; use {possible}")
    if family in SCALED_AS_TRAINED:
        trained, sigma = scheduler.trained_noise_sigma, trajectory.init_noise_sigma
        if not math.isclose(trained, sigma, rel_tol=1e-6):
            where = f"scheduler: {scheduler.CLASS} begins with noise of sigma {sigma:g} here, but diffusers'"
            raise SpecError(
                f"{where} {SCALED_AS_TRAINED[family]}, {trained:g}; use timestep_spacing 'trailing' or 'linspace', "
                "more than one step and no sigma_max"
            )
