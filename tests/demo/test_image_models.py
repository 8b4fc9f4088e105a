"""The checkpoints for super-resolution and inpainting: their size and form, and that their images are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline, LDMSuperResolutionPipeline, UNet2DModel, VQModel
from PIL import Image

from ldm_export.demo import TASKS, demo_checkpoint, demo_config, demo_task, is_demo
from ldm_export.originals import open_model
from ldm_export_demo.inputs import low_resolution, masked_trials, trial_images
from ldm_export_demo.restoration import filled, grade_inpainting, psnr, shows_the_same
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from tests.support.torch_pipeline import torch_pipeline

MAX_BYTES = 8_000_000
FIGURES = Path(__file__).parents[2] / "demo/figures"


@pytest.mark.parametrize("task", TASKS[1:])
def test_each_is_small_half_precision_and_safe(task: str) -> None:
    folder = demo_checkpoint(task)
    files = [path for path in (folder.parent if folder.is_file() else folder).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for path in (path for path in files if path.suffix == ".safetensors"):
        header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
        assert {tensor["dtype"] for name, tensor in json.loads(header).items() if name != "__metadata__"} == {"F16"}


def test_super_resolution_loads_unchanged_in_diffusers() -> None:
    pipeline = DiffusionPipeline.from_pretrained(demo_checkpoint("super-resolution"))
    assert type(pipeline) is LDMSuperResolutionPipeline
    assert type(pipeline.unet) is UNet2DModel and type(pipeline.vqvae) is VQModel
    assert demo_config("super-resolution") is None


def recognised(folder: Path, task: str) -> bool:
    bundle = Bundle.open(folder)
    assert not is_demo(bundle) and not is_demo(demo_checkpoint(task))
    return bundle.manifest.family == task.replace("-", "_") and demo_task(bundle) == task


@pytest.mark.slow
def test_the_super_resolution_bundle_is_recognised(enlarging_bundle: Path) -> None:
    assert recognised(enlarging_bundle, "super-resolution")


def test_enlarged_images_are_better_than_bicubic(tmp_path: Path) -> None:
    """On the torch modules, because a build of this model takes longer than its images."""
    originals = trial_images(12)
    small = [low_resolution(image) for image in originals]
    smooth = [np.asarray(Image.fromarray(one).resize((64, 64), Image.Resampling.BICUBIC)) for one in small]
    with torch_pipeline(open_model(demo_checkpoint("super-resolution")), tmp_path / "files") as pipeline:
        done = pipeline(image=np.stack(small), seed=0, eta=0.0, num_inference_steps=20)
    images = [np.asarray(one) for one in done.images]
    gains = [psnr(a, o) - psnr(b, o) for a, b, o in zip(images, smooth, originals, strict=True)]
    assert np.mean(gains) >= 2.5
    assert np.mean([shows_the_same(a, o) for a, o in zip(images, originals, strict=True)]) >= 0.6
    assert not any(shows_the_same(b, o) for b, o in zip(smooth, originals, strict=True))


@pytest.mark.slow
def test_hidden_parts_of_objects_are_completed(redrawing_bundle: Path) -> None:
    assert recognised(redrawing_bundle, "inpainting")
    trials = masked_trials(12, ("part",))
    image, mask = (np.stack([getattr(one, name) for one in trials]) for name in ("image", "mask"))
    with LatentDiffusionPipeline.from_bundle(redrawing_bundle, precision="fp32") as pipeline:
        done = pipeline(image=image, mask=mask[..., None], seed=0, eta=1.0, num_inference_steps=20)
    grades = [grade_inpainting(np.asarray(one), trial) for one, trial in zip(done.images, trials, strict=True)]
    assert all(grade.unchanged for grade in grades)
    assert np.mean([grade.correct for grade in grades]) >= 0.6
    assert not any(grade_inpainting(filled(trial), trial).correct for trial in trials)


def test_the_measured_figures_meet_their_bars() -> None:
    enlarged, redrawn = (json.loads((FIGURES / f"{task}.json").read_text()) for task in TASKS[1:])
    assert enlarged["images"] >= 100 and redrawn["images"] >= 200
    assert enlarged["model"]["psnr"] - enlarged["bicubic"]["psnr"] >= 3
    assert enlarged["model"]["same"] >= 0.8 and enlarged["bicubic"]["same"] <= 0.1
    assert redrawn["model"]["part"]["correct"] >= 0.75 and redrawn["background_fill"]["part"]["correct"] <= 0.1
    assert redrawn["model"]["all"]["unchanged"] == 1
