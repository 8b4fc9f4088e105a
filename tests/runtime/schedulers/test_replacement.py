"""Another scheduler for a model: the oracle is diffusers' ``from_config`` with the config of the model's scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_runtime.errors import SpecError
from ldm_runtime.request import Request
from ldm_runtime.schedulers import SCHEDULERS, scheduler_from_config
from ldm_runtime.schedulers.replacement import GIVEN, options_given, replacement
from tests.runtime.schedulers.scheduler_oracle import LATENT_DIFFUSION, diffusers_class
from tests.support.numpy_model import numpy_pipeline

CONFIGS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {  # as published with Stable Diffusion
        **LATENT_DIFFUSION,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "DDIMScheduler": {**LATENT_DIFFUSION, "clip_sample": False, "timestep_spacing": "leading"},
    "EulerDiscreteScheduler": {**LATENT_DIFFUSION, "prediction_type": "v_prediction", "use_karras_sigmas": True},
}


def manifest_of(name: str) -> dict[str, Any]:
    """The scheduler in a bundle's manifest."""
    given = options_given(CONFIGS[name] | {"_diffusers_version": "0.6", "unknown": [1], "variance_type": {}})
    return scheduler_from_config({"class": name, **CONFIGS[name]}).to_config() | {GIVEN: given}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("other", SCHEDULERS)
def test_options_are_those_of_from_config(name: str, other: str) -> None:
    own = diffusers_class(name).from_config(CONFIGS[name])
    expected = diffusers_class(other).from_config(own.config).config
    result = replacement(other, manifest_of(name)).to_config()
    assert result == {"class": other} | {option: expected[option] for option in result if option != "class"}


def test_without_what_the_checkpoint_gives() -> None:
    """In an older bundle, options that differ from the defaults count as given."""
    config = scheduler_from_config({"class": "DDIMScheduler", **CONFIGS["DDIMScheduler"]}).to_config()
    assert replacement("EulerDiscreteScheduler", config) == scheduler_from_config(
        {"class": "EulerDiscreteScheduler", **LATENT_DIFFUSION}
    )
    compvis = config | {"timestep_spacing": "compvis"}
    assert replacement("UniPCMultistepScheduler", compvis).to_config()["timestep_spacing"] == "linspace"
    assert replacement("DDIMScheduler", compvis).to_config()["timestep_spacing"] == "compvis"


def test_refusals() -> None:
    with pytest.raises(SpecError, match=r"^scheduler: got 'euler', expected one of DDIMScheduler, "):
        replacement("euler", manifest_of("DDIMScheduler"))
    config = {"class": "DDIMScheduler", GIVEN: {"prediction_type": "sample"}}
    with pytest.raises(SpecError, match=r"^scheduler: prediction_type: got 'sample', expected one of epsilon, v_pred"):
        replacement("EulerAncestralDiscreteScheduler", config)
    assert options_given({"beta_start": float("nan"), "beta_end": 10**5000, "solver_type": "x" * 99}) == {}


def test_requests_select_a_scheduler(tmp_path: Path) -> None:
    pipeline = numpy_pipeline(tmp_path, scheduler=manifest_of("PNDMScheduler"))
    for name in ("UniPCMultistepScheduler", "DDIMScheduler"):
        other = numpy_pipeline(tmp_path, scheduler=replacement(name, manifest_of("PNDMScheduler")).to_config())
        expected = other("a", seed=1, num_inference_steps=5).latents
        result = pipeline("a", seed=1, num_inference_steps=5, scheduler=name).latents
        np.testing.assert_array_equal(result, expected)
    with pytest.raises(SpecError, match="got EulerDiscreteScheduler, but diffusers' LDMTextToImagePipeline does not"):
        pipeline.plan(Request("a", scheduler="EulerDiscreteScheduler"))
    with pytest.raises(SpecError, match="scheduler: got 3, expected one of"):
        pipeline.plan(Request("a", scheduler=3))  # type: ignore[arg-type]
