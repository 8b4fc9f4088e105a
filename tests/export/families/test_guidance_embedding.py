"""UNets that embed the guidance scale (latent consistency models): images equal those of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from ldm_export.bundle.build import build
from ldm_export.families import family_named, open_checkpoint
from ldm_export.families.description import described
from ldm_export.quality.measures import TOLERANCES
from ldm_export.quality.verification import verify
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.conditioning.guidance_scale import guidance_scale_embedding
from ldm_runtime.triton.tensors import input_fields
from tests.support.checkpoints import edit_json
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion import stable_diffusion_checkpoint
from tests.support.stable_diffusion_xl import stable_diffusion_xl_checkpoint
from tests.support.torch_pipeline import torch_pipeline

CHANNELS = 16


def distilled(folder: Path, make: Callable[[Path], Path]) -> Path:
    """A checkpoint whose UNet embeds the guidance scale, with LCM's scheduler."""
    make(folder)
    unet: Any = UNet2DConditionModel
    config = unet.load_config(folder / "unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = unet.from_config(config, time_cond_proj_dim=CHANNELS)
    made.time_embedding.cond_proj.weight.data *= 20  # so that the scale changes the image
    made.save_pretrained(folder / "unet")
    LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    ).save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    return folder


@pytest.fixture(scope="module")
def checkpoints(shared: SharedFolders) -> dict[str, Path]:
    """Name -> checkpoint; read-only."""
    makers: dict[str, Callable[[Path], Path]] = {
        "sd": stable_diffusion_checkpoint,
        "xl": stable_diffusion_xl_checkpoint,
        "inpainting": partial(stable_diffusion_checkpoint, inpainting=True),
    }
    return {
        name: shared.once(f"lcm_{name}", lambda folder, make=make: distilled(folder, make))
        for name, make in makers.items()
    }


@pytest.mark.parametrize("scale", [1.0, 1.7, 8.5])
@pytest.mark.parametrize("channels", [4, 9, 256])
def test_the_embedding_is_that_of_diffusers(scale: float, channels: int) -> None:
    pipeline: Any = LatentConsistencyModelPipeline
    expected = pipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), channels).numpy()
    assert np.abs(guidance_scale_embedding(scale, channels) - expected).max() < 1e-3


@pytest.mark.parametrize("name", ["sd", "xl"])
def test_images_equal_diffusers(checkpoints: dict[str, Path], name: str, tmp_path: Path) -> None:
    folder = checkpoints[name]
    pipelines = [DiffusionPipeline.from_pretrained(folder)]
    if name == "sd":
        pipelines.append(LatentConsistencyModelPipeline.from_pretrained(folder))
    images = []
    with torch_pipeline(open_checkpoint(folder), tmp_path / "files") as pipe:
        for seed, scale in enumerate((8.5, 1.5)):
            request: dict[str, Any] = {"guidance_scale": scale, "num_inference_steps": 3}
            ours = np.stack([np.asarray(image, int) for image in pipe(["red", "a"], seed=seed, **request).images])
            for pipeline in pipelines:
                pipeline.set_progress_bar_config(disable=True)
                with torch.random.fork_rng(devices=[]):
                    theirs = pipeline(["red", "a"], generator=torch.manual_seed(seed), **request).images
                assert np.abs(ours - np.stack([np.asarray(image, int) for image in theirs])).max() <= 1
            images.append(np.asarray(pipe("red", seed=0, **request).images[0], int))
    assert np.abs(images[0] - images[1]).max() > 1


def test_the_description(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints["sd"])
    model = described(family_named(checkpoint.family), checkpoint)
    assert (model.guidance, model.defaults.num_inference_steps, model.defaults.guidance_scale) == ((), 4, 8.5)
    assert [entry.kind for entry in model.conditioning] == ["text", "start_image", "guidance_scale"]
    names = [field.name for field in input_fields(model)]
    assert names.count("GUIDANCE") == 1 and "GUIDANCE_EVERY" not in names


def image_and_mask() -> dict[str, Image.Image]:
    generator = np.random.default_rng(0)
    return {
        "image": Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)),
        "mask": Image.fromarray((generator.random((16, 16)) > 0.5).astype(np.uint8) * 255),
    }


def test_images_of_an_inpainting_unet_equal_diffusers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder, pictures = checkpoints["inpainting"], image_and_mask()
    pipeline: Any = StableDiffusionInpaintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    request: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16}
    images = []
    with torch_pipeline(open_checkpoint(folder), tmp_path / "files") as pipe:
        for scale in (8.5, 1.5):
            (ours,) = pipe("red", **pictures, seed=1, guidance_scale=scale, **request).images
            with torch.random.fork_rng(devices=[]):
                (theirs,) = pipeline(
                    "red", *pictures.values(), generator=torch.manual_seed(1), guidance_scale=scale, **request
                ).images
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
            images.append(np.asarray(ours, int))
    assert np.abs(images[0] - images[1]).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "xl", "inpainting"])
def test_the_bundle(checkpoints: dict[str, Path], name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints[name])
    bundle = build(checkpoint, tmp_path / "bundle", "fp16").bundle
    pictures = image_and_mask() if name == "inpainting" else {}
    request = {"prompts": "red", "guidance_scale": 3.0, **pictures}
    for precision in ("fp32", "fp16"):
        assert verify(bundle, checkpoint, [request], 3, precision, TOLERANCES[precision]).failures == []
    with LatentDiffusionPipeline.from_bundle(bundle, backend="onnxruntime", precision="fp32") as pipe:
        one, other = (
            np.asarray(pipe("red", **pictures, seed=0, guidance_scale=scale).images[0], int) for scale in (8.5, 1.5)
        )
    assert np.abs(one - other).max() > 1
