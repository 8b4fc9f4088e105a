"""SD Turbo and SDXL Turbo: images of small checkpoints equal diffusers', with the options of their model cards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
)

from ldm_export.families import open_checkpoint
from ldm_runtime import Request
from tests.support.checkpoints import edit_json
from tests.support.start_images import IMAGE, MASK, assert_same, ours, theirs
from tests.support.torch_pipeline import torch_pipeline

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULERS: dict[str, Any] = {"Euler": EulerDiscreteScheduler, "Euler ancestral": EulerAncestralDiscreteScheduler}
PROMPT = ["a red circle!"]
START = {"image": IMAGE, "num_inference_steps": 2, "strength": 0.5}
REQUESTS: list[dict[str, Any]] = [
    {"prompt": PROMPT, "num_inference_steps": 1},
    {"prompt": [*PROMPT, "the photo, green"], "num_inference_steps": 4, "num_images_per_prompt": 2},
    {"prompt": PROMPT, **START},
    {"prompt": PROMPT, **START, "num_inference_steps": 4, "strength": 0.75},
    {"prompt": PROMPT, **START, "mask_image": MASK},
]
"""From noise in one and four steps, from an image as the model cards say and in more steps, and inpainting."""
PIPELINES: dict[str, Any] = {"SD": StableDiffusionInpaintPipeline, "SDXL": StableDiffusionXLInpaintPipeline}


@pytest.mark.parametrize(
    ("name", "scheduler"), [("SD", "Euler"), ("SD", "Euler ancestral"), ("SDXL", "Euler ancestral")]
)
def test_images_equal_diffusers(
    sd2_checkpoint: Path, xl_checkpoint: Path, name: str, scheduler: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sd2_checkpoint if name == "SD" else xl_checkpoint, tmp_path / "checkpoint"))
    kind = SCHEDULERS[scheduler]
    kind(**NOISE, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", kind.__name__])
    expected = PIPELINES[name].from_pretrained(folder)
    with torch_pipeline(open_checkpoint(folder), tmp_path / "files") as pipe:
        assert pipe.plan(Request(PROMPT, guidance_scale=0.0)).branches == ("conditional",)
        for seed, request in enumerate(REQUESTS):
            options = {**request, "guidance_scale": 0.0}
            assert_same(ours(pipe, seed, **options), theirs(expected, seed, **options))
