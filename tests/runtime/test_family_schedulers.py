"""Schedulers that a family's pipeline in diffusers does not sample correctly, and timesteps a model cannot take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_runtime.errors import SpecError
from ldm_runtime.family_schedulers import check_family_scheduler
from ldm_runtime.request import Request
from ldm_runtime.schedulers import SCHEDULERS, scheduler_from_config
from ldm_runtime.timesteps import model_timesteps
from tests.support.numpy_model import IN_SIGMAS, numpy_pipeline
from tests.support.numpy_model import SCHEDULERS as CONFIGS


@pytest.mark.parametrize("family", ["text_to_image", "super_resolution", "class_conditional", "stable_diffusion"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_families_that_do_not_scale(family: str, name: str) -> None:
    scheduler = scheduler_from_config({"class": name, "clip_sample": False})
    trajectory = scheduler.trajectory(20)
    scaled = trajectory.init_noise_sigma != 1 or (trajectory.input_scale != 1).any()
    assert scaled == (name in {CONFIGS[one]["class"] for one in IN_SIGMAS})
    if scaled and family in ("text_to_image", "super_resolution"):
        with pytest.raises(SpecError, match=rf"^scheduler: got {name}, but diffusers' LDM.*; use DDIMScheduler, "):
            check_family_scheduler(family, scheduler, trajectory)
    else:
        check_family_scheduler(family, scheduler, trajectory)


@pytest.mark.parametrize(
    ("options", "steps", "fits"),
    [
        ({}, 20, True),
        ({}, 1, False),
        ({"timestep_spacing": "trailing"}, 1, True),
        ({"timestep_spacing": "leading"}, 20, False),
        ({"use_karras_sigmas": True}, 20, True),
        ({"use_karras_sigmas": True, "sigma_max": 5}, 20, False),
        ({"interpolation_type": "log_linear"}, 20, True),
    ],
    ids=str,
)
def test_noise_that_is_scaled_before_the_steps_are_known(
    tmp_path: Path, options: dict[str, Any], steps: int, fits: bool
) -> None:
    """diffusers' LDMPipeline multiplies by init_noise_sigma before it calls set_timesteps."""
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler.from_config(options)
    before = float(theirs.init_noise_sigma)
    theirs.set_timesteps(steps)
    assert (before == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)) == fits
    config = {"class": "EulerDiscreteScheduler", **options}
    pipeline = numpy_pipeline(tmp_path, text=False, scheduler=config)
    if fits:
        assert len(pipeline.plan(Request(num_inference_steps=steps)).trajectory) == steps
    else:
        with pytest.raises(SpecError, match=r"^scheduler: EulerDiscreteScheduler begins with noise of sigma"):
            pipeline.plan(Request(num_inference_steps=steps))


def test_timesteps_of_a_model_that_takes_whole_ones() -> None:
    whole = np.array([999.0, 0.0], np.float32)
    assert model_timesteps(whole, "int64").dtype == np.int64
    assert model_timesteps(np.array([1, 2]), "float32").dtype == np.float32
    with pytest.raises(SpecError, match=r"^scheduler: got the fractional timestep 947\.5, but this bundle's UNet"):
        model_timesteps(np.array([999.0, 947.5], np.float32), "int64")
