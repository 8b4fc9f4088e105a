"""diffusers' DDIMScheduler with the timesteps of CompVis' DDIMSampler, as a reference for verification."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler

from ldm_runtime.schedulers.noise_schedule import COMPVIS_SPACING

__all__ = ["CompVisDDIMScheduler"]


_Base: Any = DDIMScheduler


class CompVisDDIMScheduler(_Base):  # type: ignore[misc]
    """DDIMScheduler with timestep_spacing "compvis": every (1000 // steps)-th timestep, maybe more than ``steps``."""

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set ``timesteps``. ``num_inference_steps`` is kept, because the distance between steps depends on it."""
        options: Any = self.config
        if options.timestep_spacing != COMPVIS_SPACING:
            super().set_timesteps(num_inference_steps, device)
            return
        count = options.num_train_timesteps
        self.num_inference_steps = num_inference_steps
        timesteps = torch.arange(0, count, count // num_inference_steps).flip(0) + options.steps_offset
        self.timesteps = timesteps.to(device)
