"""Configs: by class name, there and back, foreign keys, and values that are refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import diffusers
import numpy as np
import pytest

from ldm_runtime.errors import SpecError
from ldm_runtime.schedulers import SCHEDULERS, DPMSolverMultistep, scheduler_from_config
from ldm_runtime.schedulers.dpm_solver import FOREIGN
from tests.runtime.schedulers.scheduler_oracle import LATENT_DIFFUSION, diffusers_class

HUGE = [[["x" * 99] * 99] * 99, 10**5000, np.zeros((50, 50)), "y" * 9999, {1: "z" * 999}, object(), "a\nb"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_by_class_name(name: str) -> None:
    config = {"class": name, "_class_name": "Other", "_diffusers_version": "0.4", **LATENT_DIFFUSION}
    scheduler = scheduler_from_config(config)
    assert type(scheduler) is SCHEDULERS[name]
    assert (scheduler.to_config()["class"], scheduler.num_train_timesteps) == (name, 1000)
    text = json.dumps(scheduler.to_config(), allow_nan=False)
    assert scheduler_from_config(json.loads(text)) == scheduler
    theirs = diffusers_class(name).from_config({k: v for k, v in json.loads(text).items() if k != "class"})
    assert all(theirs.config[k] == v for k, v in scheduler.to_config().items() if k != "class")


@pytest.mark.parametrize("name", [None, 3, "DEISMultistepScheduler", "ddim", *HUGE], ids=lambda n: type(n).__name__)
def test_unknown_classes_are_refused(name: Any) -> None:
    with pytest.raises(SpecError, match=r"^scheduler: class: got .*DDIMScheduler, PNDMScheduler, DPM") as caught:
        scheduler_from_config({"class": name})
    assert len(str(caught.value)) <= 300


def test_what_is_no_config_is_refused() -> None:
    config: Any
    for config in (None, [], "DDIMScheduler", 3):
        with pytest.raises(SpecError, match=r"^scheduler: got .*, expected an object"):
            scheduler_from_config(config)
    with pytest.raises(SpecError, match="class: got None"):
        scheduler_from_config({})


@pytest.mark.parametrize("name", SCHEDULERS)
def test_messages_are_short_for_every_value(name: str) -> None:
    options = {"x" * 9999: 1, "shift": 1, "thresholdin": True} | {
        option: value
        for option in (*SCHEDULERS[name]().to_config(), *SCHEDULERS[name].FOREIGN)
        for value in HUGE  # type: ignore[attr-defined]
    }
    for option in options:
        for value in HUGE:
            try:
                scheduler_from_config({"class": name, option: value} if option != "class" else {"class": value})
            except SpecError as error:
                assert len(str(error)) <= 300
                assert "\n" not in str(error)


def test_dpm_solver_defaults_are_those_of_diffusers() -> None:
    scheduler, expected = DPMSolverMultistep(), diffusers.DPMSolverMultistepScheduler().config
    assert all(expected[name] == value for name, value in scheduler.to_config().items() if name != "class")
    missing = {name for name in expected if not name.startswith("_")} - set(scheduler.to_config())
    assert missing - set(FOREIGN) == {"lambda_min_clipped"}
    assert scheduler.lambda_min_clipped == expected["lambda_min_clipped"] == -math.inf
    assert DPMSolverMultistep.from_config(dict(expected)) == scheduler


@pytest.mark.parametrize(
    "options",
    [
        {"solver_order": 4},
        {"solver_order": 0},
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        {"algorithm_type": "dpmsolver"},
        {"algorithm_type": "unipc"},
        {"solver_type": "euler"},
        {"final_sigmas_type": "one"},
        {"prediction_type": "flow_prediction"},
        {"use_flow_sigmas": True},
        {"variance_type": "learned_range"},
        {"use_beta_sigmas": True, "use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "use_karras_sigmas": True},
        {"lambda_min_clipped": math.nan},
        {"lambda_min_clipped": "-inf"},
        {"sigma_min": 0},
        {"sigma_max": math.inf},
        {"lower_order_final": "no"},
    ],
    ids=str,
)
def test_dpm_solver_values_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=r"^scheduler: .*got .*expected "):
        DPMSolverMultistep.from_config(LATENT_DIFFUSION | options)


@pytest.mark.parametrize("name", FOREIGN)
def test_dpm_solver_ignores_options_of_others(name: str) -> None:
    for value in FOREIGN[name] or (None, True, "pt"):
        assert DPMSolverMultistep.from_config({name: value}) == DPMSolverMultistep()


def test_dpm_solver_steps_refused() -> None:
    steps: Any
    for steps in (0, -1, 10_001, 50.0, "50", True, None):
        with pytest.raises(SpecError, match=r"^steps: got .*, expected 1\.\.10000"):
            DPMSolverMultistep().trajectory(steps)
    with pytest.raises(SpecError, match=r"^steps: got 1000: call \d+ at timestep .*expected fewer steps"):
        DPMSolverMultistep().trajectory(1000)
    with pytest.raises(SpecError, match=r"lambda_min_clipped: got 100\.0, expected a lower value"):
        DPMSolverMultistep(lambda_min_clipped=100, timestep_spacing="trailing").trajectory(5)
    with pytest.raises(SpecError, match=r"sigmas of training are not distinct"):
        DPMSolverMultistep(beta_start=1e-12, beta_end=1e-12, use_lu_lambdas=True).trajectory(5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"prediction_type": "flow"}),
        ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}),
        ("EulerDiscreteScheduler", {"timestep_type": "float"}),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "one"}),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"thresholding": True}),
        ("EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}),
        ("EulerAncestralDiscreteScheduler", {"use_karras_sigmas": True}),
        ("DDPMScheduler", {"variance_type": "learned_range"}),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}),
        ("LMSDiscreteScheduler", {"rescale_betas_zero_snr": True}),
        ("LMSDiscreteScheduler", {"beta_schedule": "exp"}),
        ("HeunDiscreteScheduler", {"clip_sample_range": 0}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"solver_p": {}}),
        ("UniPCMultistepScheduler", {"solver_order": 5}),
        ("UniPCMultistepScheduler", {"disable_corrector": [-1]}),
        ("UniPCMultistepScheduler", {"disable_corrector": 3}),
        ("LCMScheduler", {"original_inference_steps": 1001}),
        ("TCDScheduler", {"original_inference_steps": 0}),
    ],
    ids=str,
)
def test_options_that_are_refused_by_name(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=rf"^scheduler: .*{next(iter(options))}.*expected "):
        scheduler_from_config({"class": name, **options})


def test_steps_and_eta_refused() -> None:
    with pytest.raises(SpecError, match=r"^steps: got 51, expected 1\.\.50, the original_inference_steps"):
        scheduler_from_config({"class": "LCMScheduler"}).trajectory(51)
    with pytest.raises(SpecError, match=r"^eta: got 1\.5, expected a number in \[0, 1\]"):
        scheduler_from_config({"class": "TCDScheduler"}).trajectory(4, 1.5)
    with pytest.raises(SpecError, match=r"^steps: got 100: the first two have the same timestep 998"):
        scheduler_from_config({"class": "UniPCMultistepScheduler", "use_beta_sigmas": True}).trajectory(100)
    with pytest.raises(SpecError, match=r"^steps: got 5: call 4 at timestep .*has no finite coefficients"):
        scheduler_from_config({"class": "UniPCMultistepScheduler", "solver_type": "bh1"}).trajectory(5)
    for name in ("LMSDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        config = {"class": name, "beta_start": 1e-12, "beta_end": 1e-12}
        with pytest.raises(SpecError, match=r"has no finite coefficients"):
            scheduler_from_config(config).trajectory(5)
        with pytest.raises(SpecError, match=r"sigmas from 0 to 0, expected positive"):
            scheduler_from_config(config | {"use_karras_sigmas": True}).trajectory(5)


def test_no_torch_is_imported() -> None:
    code = "import sys, ldm_runtime.schedulers; assert not {'torch', 'diffusers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
