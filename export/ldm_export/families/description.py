"""Describes the model of a checkpoint, including everything that depends on its scheduler."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.families.family import Family
from ldm_runtime.family_schedulers import check_family_scheduler
from ldm_runtime.model import TIMESTEP, UNET, ModelDescription
from ldm_runtime.schedulers import scheduler_from_config
from ldm_runtime.schedulers.replacement import GIVEN, options_given
from ldm_runtime.specs import ComponentSpec

__all__ = ["described"]


def described(family: Family, checkpoint: Checkpoint) -> ModelDescription:
    """Describe the model of a checkpoint. Its UNet takes float32 timesteps if the scheduler has fractional ones.

    The scheduler options of the checkpoint are recorded, so that requests can select another scheduler with them.

    Raises:
        SpecError: The runtime does not support the scheduler with these options, or the family's pipeline in diffusers
            does not sample correctly with it.
    """
    model = family.describe(checkpoint)
    scheduler = scheduler_from_config(model.scheduler)
    trajectory = scheduler.trajectory(model.defaults.num_inference_steps)
    check_family_scheduler(model.family, scheduler, trajectory)
    model = replace(model, scheduler={**model.scheduler, GIVEN: options_given(checkpoint.scheduler_given)})
    if np.issubdtype(trajectory.timesteps.dtype, np.integer) and not family.fractional_timesteps:
        return model
    return replace(model, components={**model.components, UNET: _with_float_timestep(model.components[UNET])})


def _with_float_timestep(unet: ComponentSpec) -> ComponentSpec:
    inputs = (replace(tensor, dtype="float32") if tensor.name == TIMESTEP else tensor for tensor in unet.inputs)
    return replace(unet, inputs=tuple(inputs))
