"""On an NVIDIA GPU: fp16 images of every family, by ONNX Runtime on CUDA, are those of the fp32 graphs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.families import open_checkpoint
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from ldm_runtime.images import psnr
from tests.support.bundles import cuda_bundle
from tests.support.paper_bundles import BUILT, paper_bundle
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion import stable_diffusion_checkpoint
from tests.support.start_images import IMAGE, MASK

pytestmark = pytest.mark.gpu
Fields = dict[str, Any]
STEPS: Fields = {"num_inference_steps": 6, "seed": 3}
STARTED: Fields = {"prompts": "a red circle", "image": IMAGE, "strength": 0.6}
MASKED: Fields = {"prompts": "a red circle", "image": IMAGE, "mask": MASK, "strength": 0.9}
CASES: dict[str, tuple[Fields, ...]] = {
    "sd2": (
        {"prompts": ["a red circle", "a blue square"], "guidance_scale": 5.0},
        {"prompts": "a red circle", "guidance_scale": 1.0, "scheduler": "EulerAncestralDiscreteScheduler"},
        {"prompts": "a red circle", "guidance_rescale": 0.7, "clip_skip": 1, "height": 16, "width": 24},
        {"prompts": "a red circle", "scheduler": "DPMSolverMultistepScheduler", "cache_every": 2, "full_steps": 1},
        STARTED,
        MASKED,
    ),
    "sd9": (MASKED,),
    "xl": ({"prompts": "a red circle", "prompts_2": "an oil painting", "original_size": (64, 48)}, STARTED, MASKED),
}
"""Requests of the Stable Diffusion models; the others have one request each."""


def checkpoint_of(name: str, shared: SharedFolders, request: pytest.FixtureRequest) -> Checkpoint:
    if name == "sd9":
        return open_checkpoint(
            shared.once("sd9", lambda folder: stable_diffusion_checkpoint(folder, 1, inpainting=True))
        )
    if name in BUILT:
        return paper_bundle(shared, name).checkpoint()
    return open_checkpoint(request.getfixturevalue(f"{name}_checkpoint"))


@pytest.fixture(params=[*CASES, *BUILT])
def case(request: pytest.FixtureRequest, shared: SharedFolders) -> tuple[Bundle, tuple[Fields, ...]]:
    """A bundle with graphs for CUDA, and requests of its task."""
    name = request.param
    bundle = cuda_bundle(shared, name, checkpoint_of(name, shared, request))
    return bundle, CASES[name] if name in CASES else (paper_bundle(shared, name).row.options,)


def test_images(case: tuple[Bundle, tuple[Fields, ...]]) -> None:
    bundle, requests = case
    draw: Callable[..., LatentDiffusionPipeline] = LatentDiffusionPipeline.from_bundle
    with (
        draw(bundle, backend="onnxruntime", device="cuda", precision="fp16") as on_gpu,
        draw(bundle, backend="onnxruntime", device="cpu", precision="fp32") as on_cpu,
    ):
        for fields in requests:
            ours, expected = (pipeline(**STEPS | fields).arrays for pipeline in (on_gpu, on_cpu))
            assert ours.shape == expected.shape and expected.std() > 0.05
            result = psnr(np.asarray(ours), np.asarray(expected), 1.0)
            assert result is None or result >= 40, (fields, result)
