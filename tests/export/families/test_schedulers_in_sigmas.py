"""Schedulers in sigmas: images of a small random checkpoint of LDMPipeline, and noise that it scales otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_export.bundle.build import build
from ldm_export.families import open_checkpoint
from ldm_export.families.reference import torch_scheduler
from ldm_export.families.unconditional import UNCONDITIONAL
from ldm_export.quality.measures import TOLERANCES
from ldm_export.quality.verification import verify
from ldm_runtime.errors import CheckpointError, SpecError
from tests.export.families.test_unconditional import unconditional_checkpoint
from tests.support.checkpoints import edit_json

IN_SIGMAS: dict[str, dict[str, Any]] = {
    "EulerDiscreteScheduler": {"use_karras_sigmas": True},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_schedulers_in_sigmas_equal_diffusers(precision: str, tmp_path: Path) -> None:
    """Their timesteps are fractional, so the UNet takes float32 ones; in fp16 the embedding stays in fp32."""
    folder = unconditional_checkpoint(tmp_path / "checkpoint", vq=False, levels=1)
    schedulers = IN_SIGMAS if precision == "fp16" else {"EulerDiscreteScheduler": {"use_karras_sigmas": True}}
    for scheduler, options in schedulers.items():
        edit_json(folder / "model_index.json", scheduler=["diffusers", scheduler])
        changes = {"_class_name": scheduler, "timestep_spacing": "linspace", **options}
        edit_json(folder / "scheduler/scheduler_config.json", **changes)
        opened = open_checkpoint(folder)
        bundle = build(opened, tmp_path / "bundle", precision).bundle  # the second and third keep the graphs
        embedding = bundle.manifest.components["time_embedding"].spec
        assert [str(tensor) for tensor in embedding.inputs] == ["timestep: float32 [batch]"]
        result = verify(bundle, opened, [{}], 4, precision, TOLERANCES[precision])
        assert result.failures == []
        assert np.asarray(result.images[0].ours).std() > 1


def test_noise_that_ldm_pipeline_scales_otherwise_is_refused(tmp_path: Path) -> None:
    folder = unconditional_checkpoint(tmp_path / "checkpoint", vq=False)
    name = "EulerDiscreteScheduler"
    edit_json(folder / "model_index.json", scheduler=["diffusers", name])
    edit_json(folder / "scheduler/scheduler_config.json", _class_name=name, timestep_spacing="leading")
    with pytest.raises(SpecError, match=rf"^scheduler: {name} begins with noise of sigma .* LDMPipeline takes"):
        build(open_checkpoint(folder), tmp_path / "bundle")


def test_verify_says_that_diffusers_needs_scipy(tmp_path: Path) -> None:
    folder = unconditional_checkpoint(tmp_path / "checkpoint", vq=False)
    edit_json(folder / "model_index.json", scheduler=["diffusers", "LMSDiscreteScheduler"])
    changes = {"_class_name": "LMSDiscreteScheduler", "timestep_spacing": "linspace", "clip_sample": ...}
    edit_json(folder / "scheduler/scheduler_config.json", **changes)
    checkpoint = open_checkpoint(folder)
    assert UNCONDITIONAL.describe(checkpoint).scheduler["class"] == "LMSDiscreteScheduler"
    with pytest.raises(CheckpointError, match="diffusers needs SciPy for LMSDiscreteScheduler"):
        torch_scheduler(checkpoint)
