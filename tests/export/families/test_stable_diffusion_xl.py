"""Stable Diffusion XL: images of a small random checkpoint equal those of StableDiffusionXLPipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from numpy.typing import NDArray

from ldm_calibration.settings import CalibrationSettings
from ldm_export.bundle.build import BuildOptions, build
from ldm_export.cli import main
from ldm_export.engine.request import EngineRequest
from ldm_export.families import open_checkpoint
from ldm_export.quality.measures import TOLERANCES
from ldm_export.quality.verification import verify
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import CheckpointError, SpecError
from tests.support.checkpoints import edit_json
from tests.support.stable_diffusion_xl import XL_SCHEDULERS
from tests.support.start_images import IMAGE, MASK
from tests.support.torch_pipeline import torch_pipeline

PROMPTS, NEGATIVE = ["a red circle!", "the photo, green"], ["", "a square"]
NAMES = {"prompt_2": "prompts_2", "num_images_per_prompt": "images_per_prompt"}
"""Names of diffusers, and ours."""
OPTIONS: dict[str, dict[str, Any]] = {
    "zeros without negative prompt": {"prompt": PROMPTS, "num_images_per_prompt": 2},
    "negative prompts, not square": {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "height": 24, "width": 8},
    "an empty negative prompt": {"prompt": PROMPTS[:1], "negative_prompt": [""], "guidance_rescale": 0.7},
    "other texts for the second encoder": {
        "prompt": PROMPTS,
        "prompt_2": ["green", "the"],
        "negative_prompt": NEGATIVE,
        "negative_prompt_2": ["a", "red"],
    },
    "sizes, a layer skipped": {
        "prompt": PROMPTS[:1],
        "clip_skip": 1,
        "original_size": (40, 24),
        "crops_coords_top_left": (3, 9),
        "target_size": (16, 24),
        "negative_original_size": (8, 9),
        "negative_crops_coords_top_left": (1, 0),
        "negative_target_size": (4, 5),
    },
}
TURBO = {"prompt": PROMPTS, "guidance_scale": 0.0}


@pytest.fixture
def checkpoint(xl_checkpoint: Path) -> Path:
    """A small checkpoint; read-only."""
    return xl_checkpoint


@pytest.fixture
def bundle(xl_bundle: Bundle) -> Bundle:
    """Its bundle in fp32; read-only."""
    return xl_bundle


def reference(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, seed: int, **options: Any) -> NDArray[np.int64]:
    with torch.random.fork_rng(devices=[]):
        images = pipeline(generator=torch.manual_seed(seed), **options).images
    return np.stack([np.asarray(image, np.int64) for image in images])


def ours(pipeline: LatentDiffusionPipeline, seed: int, prompt: list[str], **options: Any) -> NDArray[np.int64]:
    named: Any = {NAMES.get(name, name): value for name, value in options.items()}
    return np.stack([np.asarray(image, np.int64) for image in pipeline(prompt, seed=seed, **named).images])


def assert_same(one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    assert one.shape == other.shape and other.std() > 10
    assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("base", list(OPTIONS.values()), 4),
        ("DDIM", [OPTIONS["other texts for the second encoder"] | {"eta": 0.5}], 4),
        ("turbo", [TURBO], 1),
        ("turbo", [TURBO, OPTIONS["zeros without negative prompt"]], 3),
    ],
    ids=["base", "DDIM", "one step", "three steps"],
)
def test_images_equal_diffusers(
    checkpoint: Path, name: str, options: list[dict[str, Any]], steps: int, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    XL_SCHEDULERS[name].save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", type(XL_SCHEDULERS[name]).__name__])
    expected = reference(folder)
    with torch_pipeline(open_checkpoint(folder), tmp_path / "files") as pipe:
        for seed, one in enumerate(options):
            one = one | {"num_inference_steps": steps}
            assert_same(ours(pipe, seed, **one), theirs(expected, seed, **one))


def test_without_forced_zeros(checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    edit_json(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    request = {"prompt": PROMPTS, "num_inference_steps": 3}
    with torch_pipeline(open_checkpoint(folder), tmp_path / "files") as pipe:
        assert_same(ours(pipe, 1, **request), theirs(reference(folder), 1, **request))


def test_each_option_changes_the_image(bundle: Bundle) -> None:
    plain: Any = {"prompt": ["a red circle"], "negative_prompt": "", "num_inference_steps": 2}
    changes: list[dict[str, Any]] = [
        {"negative_prompt": None},
        {"prompts_2": "green"},
        {"negative_prompt_2": "green"},
        {"clip_skip": 1},
        {"original_size": (40, 24)},
        {"crops_coords_top_left": (9, 0)},
        {"target_size": (40, 24)},
        {"negative_original_size": (40, 24), "negative_target_size": (16, 16)},
    ]
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipe:
        base = ours(pipe, 0, **plain)
        for change in changes:
            assert np.abs(ours(pipe, 0, **plain | change) - base).max() >= 1, change


def test_the_bundle(bundle: Bundle, checkpoint: Path) -> None:
    bundle.check()
    model = bundle.manifest.model
    assert [*model.components][:6] == [
        "text_encoder",
        "text_encoder_2",
        "encoder",
        "cross_attention_kv",
        "added_embedding",
        "time_embedding",
    ]
    assert [str(tensor) for tensor in model.components["text_encoder_2"].outputs] == [
        "context_2: float32 [batch, 77, 128]",
        "skipped_context_2: float32 [batch, 2, 77, 128]",
        "text_embeds: float32 [batch, 48]",
    ]
    inputs = {tensor.name for tensor in model.components["unet"].inputs}
    assert {"sample", "added_embedding.0", "time_embedding", "kv.0"} <= inputs
    assert not inputs & {"context", "context_2", "text_embeds", "time_ids", "timestep"}
    expected = reference(checkpoint)
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipe:
        for seed, options in enumerate(OPTIONS.values()):
            options = options | {"num_inference_steps": 3}
            assert_same(ours(pipe, seed, **options), theirs(expected, seed, **options))


def test_requests_in_one_batch(bundle: Bundle) -> None:
    requests = [
        Request(PROMPTS, seed=1, num_inference_steps=4, original_size=(40, 24)),
        Request(PROMPTS[0], seed=2, num_inference_steps=3, negative_prompt="green", prompts_2="a", clip_skip=1),
        Request(PROMPTS[0], seed=3, num_inference_steps=2, guidance_scale=0.0),
        Request(PROMPTS[1], seed=4, num_inference_steps=4, image=IMAGE, mask=MASK, strength=0.9, target_size=(8, 8)),
    ]
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipe:
        alone = [pipe.decode([*pipe.steps(request)][-1].latents) for request in requests]
        with BatchScheduler(pipe, Limits(max_rows=12)) as scheduler:
            results = [job.result(60).images for job in [scheduler.submit(request) for request in requests]]
    for together, images in zip(results, alone, strict=True):
        assert_same(together.astype(np.int64), np.stack([np.asarray(image, np.int64) for image in images]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_skip": 2}, "clip_skip: got 2, but this text encoder can skip 1 layers"),
        ({"prompts_2": ["a", "b"]}, "prompts_2: got 2 for 1 prompts, expected one, or one each"),
        ({"negative_prompt_2": "a"}, "negative_prompt_2: got one without negative_prompt, which it depends on"),
        ({"original_size": 16}, "original_size: got 16, expected two numbers of pixels, height and width"),
        ({"crops_coords_top_left": (0, -1)}, "crops_coords_top_left: got -1, expected a whole number from 0"),
        ({"negative_target_size": (1, 1)}, "negative_target_size: got one without negative_original_size"),
    ],
    ids=str,
)
def test_requests_that_the_model_does_not_take(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    pipeline = LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime")
    with pipeline as pipe, pytest.raises(SpecError, match=message):
        pipe.plan(Request("a", **options))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"cross_attention_dim": 32}, "cross_attention_dim is 32, not the text encoder's 192"),
        ("unet/config.json", {"addition_time_embed_dim": 16}, "input_dim is 96, not 144 for 6 sizes and 48 channels"),
        ("unet/config.json", {"addition_embed_type": "text"}, "the unet's addition_embed_type asks for inputs"),
        ("vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean and latents_std are set, which is not supp"),
        ("text_encoder/config.json", {"num_hidden_layers": 1}, "a text encoder has one layer, expected two at least"),
        ("model_index.json", {"force_zeros_for_empty_prompt": 1}, "force_zeros_for_empty_prompt: got 1, expected true"),
        ("model_index.json", {"text_encoder": [None, None]}, r"got .text_encoder.: \[None, None\], expected \[library"),
        ("model_index.json", {"requires_aesthetics_score": True}, "true: it is the refiner of Stable Diffusion XL, wh"),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit(
    checkpoint: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    edit_json(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_the_command_line(bundle: Bundle, tmp_path: Path) -> None:
    images = [tmp_path / "plain.png", tmp_path / "sizes.png"]
    common = ["generate", str(bundle.folder), "a photo", "--steps", "2", "--seed", "1", "--precision", "fp32"]
    options = ["--prompt-2", "red", "--original-size", "40", "24", "--negative-crops-coords-top-left", "1", "2"]
    sizes = ["--negative-original-size", "8", "8", "--negative-target-size", "4", "4"]
    assert main([*common, "-o", str(images[0])]) == 0
    assert main([*common, *options, *sizes, "-o", str(images[1])]) == 0
    assert images[0].read_bytes() != images[1].read_bytes()


@pytest.mark.slow
def test_precisions_verification_and_engines(bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    opened = open_checkpoint(checkpoint)
    requests = [{"prompts": "a red circle"}, {"prompts": "green", "negative_prompt": "red", "prompts_2": "a"}]
    for precision in ("bf16", "fp16"):
        engines = EngineRequest("tensorrt-rtx", ("8.9",)) if precision == "fp16" else None
        built = build(opened, folder, precision, engines).bundle
        result = verify(built, opened, requests, 4, precision, TOLERANCES[precision])
        assert result.failures == []
        assert [part.name for part in result.components] == [
            "text_encoder",
            "text_encoder_2",
            "encoder",
            "unet",
            "decoder",
        ]
    assert all(len(component.engines) == 1 for component in built.manifest.components.values())
    prompts = ({"prompts": "a red circle"}, {"prompts": "the photo"})
    settings = CalibrationSettings(prompts, prompts, steps=4, samples=2, trial_steps=4, min_psnr=15.0)
    built = build(opened, folder, options=BuildOptions("int8", calibration=settings)).bundle
    assert built.precision == "int8" and built.manifest.components["unet"].graphs["int8"] == "unet/int8.onnx"
    with LatentDiffusionPipeline.from_bundle(built, precision="int8", backend="onnxruntime") as pipe:
        assert ours(pipe, 0, PROMPTS, num_inference_steps=4).std() > 10


@pytest.mark.slow
def test_an_autoencoder_beyond_the_range_of_fp16(bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    """Published autoencoders overflow in fp16 (``force_upcast``); what exceeds its range stays in fp32."""
    large = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    vae: Any = AutoencoderKL.from_pretrained(large / "vae")
    for parameter in (*vae.decoder.conv_in.parameters(), *vae.encoder.conv_in.parameters()):
        parameter.data *= 1e6
    vae.save_pretrained(large / "vae")
    with torch.inference_mode():
        decoded = vae.half().decode(torch.ones(1, 4, 8, 8, dtype=torch.float16)).sample
        encoded = vae.encode(torch.ones(1, 3, 16, 16, dtype=torch.float16)).latent_dist.mean
    assert not torch.isfinite(decoded).all() and not torch.isfinite(encoded).all()
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    opened = open_checkpoint(large)
    built = build(opened, folder, "fp16").bundle
    for name in ("decoder", "encoder"):
        report = json.loads((folder / f"report/{name}.fp16.json").read_text())
        assert any(reason.startswith("range: ") for reason in report["islands"].values()), name
    assert verify(built, opened, [{"prompts": "a red circle"}], 3, "fp16", TOLERANCES["fp16"]).failures == []
