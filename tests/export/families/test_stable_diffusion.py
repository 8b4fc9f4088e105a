"""Stable Diffusion 1.x and 2.x: images of small random checkpoints equal those of StableDiffusionPipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray

from ldm_calibration.settings import CalibrationSettings
from ldm_export.bundle.build import BuildOptions, build
from ldm_export.cli import main
from ldm_export.engine.request import EngineRequest
from ldm_export.families import family_of, open_checkpoint
from ldm_export.families.stable_diffusion import STABLE_DIFFUSION
from ldm_export.quality.measures import TOLERANCES
from ldm_export.quality.verification import verify
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import CheckpointError, SpecError
from ldm_runtime.model import check_model
from tests.support.checkpoints import edit_json
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion import COMMON, SCHEDULERS, stable_diffusion_checkpoint
from tests.support.torch_pipeline import torch_pipeline

PROMPTS, NEGATIVE = ["a red circle!", "the photo, green"], ["", "a square"]


CASES = [(version, name) for name in SCHEDULERS for version in ((1, 2) if name in COMMON else (2,))]
"""Version of the checkpoint and scheduler."""


@pytest.fixture(scope="module")
def checkpoints(sd2_checkpoint: Path, shared: SharedFolders) -> dict[int, Path]:
    """Version -> checkpoint; read-only."""
    return {1: shared.once("sd1", lambda folder: stable_diffusion_checkpoint(folder, 1)), 2: sd2_checkpoint}


@pytest.fixture(scope="module")
def bundle(sd2_bundle: Bundle) -> Bundle:
    """Bundle of version 2 in fp32 and fp16; read-only."""
    return sd2_bundle


def reference(folder: Path) -> Any:
    """diffusers' pipeline of a checkpoint."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)  # for clip_skip, transformers 5
    return pipeline


def theirs(pipeline: Any, seed: int, *, images_per_prompt: int = 1, **options: Any) -> NDArray[np.int64]:
    """Images of diffusers, with the global generator."""
    with torch.random.fork_rng(devices=[]):
        generator = torch.manual_seed(seed)
        images = pipeline(generator=generator, num_images_per_prompt=images_per_prompt, **options).images
    return np.stack([np.asarray(image, np.int64) for image in images])


def ours(pipeline: LatentDiffusionPipeline, seed: int, prompt: list[str], **options: Any) -> NDArray[np.int64]:
    return np.stack([np.asarray(image, np.int64) for image in pipeline(prompt, seed=seed, **options).images])


def assert_same(one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    assert one.shape == other.shape and other.std() > 10
    assert np.abs(one - other).max() <= 1


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults but for the steps": {"prompt": PROMPTS[:1]},
    "eta 0.5, negative prompts, two images each": {
        "prompt": PROMPTS,
        "negative_prompt": NEGATIVE,
        "eta": 0.5,
        "images_per_prompt": 2,
        "guidance_scale": 7.5,
    },
    "eta 1, without guidance": {"prompt": PROMPTS, "eta": 1.0, "guidance_scale": 1.0},
    "a guidance scale below 1": {"prompt": PROMPTS[:1], "guidance_scale": 0.0, "guidance_rescale": 0.7},
    "not square, rescaled, a layer skipped": {
        "prompt": PROMPTS,
        "negative_prompt": NEGATIVE,
        "height": 24,
        "width": 8,
        "guidance_rescale": 0.7,
        "clip_skip": 1,
    },
    "every layer skipped": {"prompt": PROMPTS[:1], "clip_skip": 3},
}


def with_scheduler(source: Path, target: Path, scheduler: Any) -> Path:
    """A copy of a checkpoint with another scheduler."""
    folder = Path(shutil.copytree(source, target))
    scheduler.save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' DPM-Solver
@pytest.mark.parametrize(("version", "name"), CASES)
def test_images_equal_diffusers(checkpoints: dict[int, Path], version: int, name: str, tmp_path: Path) -> None:
    """Every option with DDIM; with other schedulers the first ones, which include a noise of their own."""
    scheduler = SCHEDULERS[name]
    if version == 2:
        scheduler = type(scheduler).from_config(scheduler.config, prediction_type="v_prediction")
    folder = with_scheduler(checkpoints[version], tmp_path / "checkpoint", scheduler)
    expected = reference(folder)
    with torch_pipeline(open_checkpoint(folder), tmp_path / "files") as pipe:
        for seed, options in enumerate(list(OPTIONS.values())[: None if name == "DDIMScheduler" else 2]):
            options = options | {"num_inference_steps": 5}
            assert_same(ours(pipe, seed, **options), theirs(expected, seed, **options))


def test_images_of_the_bundle_equal_diffusers(checkpoints: dict[int, Path], bundle: Bundle) -> None:
    expected = reference(checkpoints[2])
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipe:
        for seed, options in enumerate(OPTIONS.values()):
            options = options | {"num_inference_steps": 4}
            assert_same(ours(pipe, seed, **options), theirs(expected, seed, **options))


def test_requests_in_one_batch(bundle: Bundle) -> None:
    requests = [
        Request(PROMPTS, negative_prompt=NEGATIVE, seed=1, num_inference_steps=4, clip_skip=2),
        Request(PROMPTS[0], seed=2, num_inference_steps=5, guidance_rescale=0.7, eta=0.5),
        Request(PROMPTS[0], seed=3, num_inference_steps=3, guidance_scale=0.0),
    ]
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime") as pipe:
        alone = [pipe.decode([*pipe.steps(request)][-1].latents) for request in requests]
        with BatchScheduler(pipe, Limits(max_rows=12)) as scheduler:
            results = [job.result(60).images for job in [scheduler.submit(request) for request in requests]]
    for together, images in zip(results, alone, strict=True):
        assert_same(together.astype(np.int64), np.stack([np.asarray(image, np.int64) for image in images]))


def test_zero_terminal_snr(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler.from_config(SCHEDULERS["DDIMScheduler"].config, **options)
    folder = with_scheduler(checkpoints[2], tmp_path / "checkpoint", scheduler)
    request = {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "guidance_rescale": 0.7, "num_inference_steps": 6}
    with torch_pipeline(open_checkpoint(folder), tmp_path / "files") as pipe:
        assert_same(ours(pipe, 3, **request), theirs(reference(folder), 3, **request))


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_options_that_the_pipeline_corrects(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    scheduler = DDIMScheduler.from_config(SCHEDULERS["DDIMScheduler"].config, steps_offset=0, clip_sample=True)
    folder = with_scheduler(checkpoints[1], tmp_path / "checkpoint", scheduler)
    checkpoint = open_checkpoint(folder)
    stated = STABLE_DIFFUSION.describe(checkpoint).scheduler
    assert (stated["steps_offset"], stated["clip_sample"]) == (1, False)
    with torch_pipeline(checkpoint, tmp_path / "files") as pipe:
        request = {"prompt": PROMPTS[:1], "num_inference_steps": 5}
        assert_same(ours(pipe, 1, **request), theirs(reference(folder), 1, **request))


def test_the_bundle(bundle: Bundle) -> None:
    bundle.check()
    model = bundle.manifest.model
    check_model(model)
    assert (model.family, model.guidance_above_one) == ("stable_diffusion", True)
    assert model.scheduler["prediction_type"] == "v_prediction"
    encoder = model.components["text_encoder"]
    assert [str(tensor) for tensor in encoder.outputs] == [
        "context: float32 [batch, 77, 128]",
        "skipped_context: float32 [batch, 3, 77, 128]",
    ]
    assert family_of({"_class_name": "StableDiffusionPipeline"}) is STABLE_DIFFUSION


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_skip": 4}, "clip_skip: got 4, but this text encoder can skip 3 layers"),
        ({"clip_skip": -1}, "clip_skip: got -1, expected a whole number"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: got 1.5, expected a number from 0 to 1"),
        ({"labels": [1]}, "labels: got a value, but this stable_diffusion model takes"),
    ],
    ids=str,
)
def test_requests_that_the_model_does_not_take(bundle: Bundle, options: dict[str, Any], message: str) -> None:
    pipeline = LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime")
    with pipeline as pipe, pytest.raises(SpecError, match=message):
        pipe("a", seed=0, num_inference_steps=2, **options)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_verification(bundle: Bundle, checkpoints: dict[int, Path], precision: str) -> None:
    requests = [{"prompts": "a red circle"}, {"prompts": "green", "negative_prompt": "red", "clip_skip": 1}]
    result = verify(bundle, open_checkpoint(checkpoints[2]), requests, 5, precision, TOLERANCES[precision])
    assert result.failures == []
    assert [component.name for component in result.components] == ["text_encoder", "encoder", "unet", "decoder"]


def test_weights_in_half_precision_alone(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    folder = stable_diffusion_checkpoint(tmp_path / "half", variant="fp16")
    assert (folder / "unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    with torch_pipeline(open_checkpoint(folder), tmp_path / "files") as pipe:
        image = ours(pipe, 0, PROMPTS, num_inference_steps=4)
    with torch_pipeline(open_checkpoint(checkpoints[1]), tmp_path / "others") as pipe:
        assert np.abs(image - ours(pipe, 0, PROMPTS, num_inference_steps=4)).max() <= 8


def test_random_weights(checkpoints: dict[int, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints[2], tmp_path / "configs"))
    for file in (*folder.rglob("*.safetensors"), *folder.glob("tokenizer/*o*b*.json"), *folder.glob("tokenizer/*.txt")):
        file.unlink()
    (folder / "tokenizer/tokenizer.json").unlink()
    edit_json(folder / "text_encoder/config.json", vocab_size=1000)
    with torch_pipeline(open_checkpoint(folder, random_weights=True), tmp_path / "files") as pipe:
        assert ours(pipe, 0, PROMPTS, num_inference_steps=2).shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 5}, r"in and out channels are \(5, 4\), the latents' 4"),
        ("unet/config.json", {"cross_attention_dim": 32}, "cross_attention_dim is 32, not the text encoder's 128"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "the unet's addition_embed_type asks for inputs"),
        ("text_encoder/config.json", {"hidden_size": -1}, "hidden_size: got -1, expected a whole number"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers: got 1000000, expected"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "expected CLIPTextModel"),
        ("model_index.json", {"tokenizer": ...}, "tokenizer: .* has no tokenizer"),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit(
    checkpoints: dict[int, Path], tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(checkpoints[1], tmp_path / "copy"))
    edit_json(folder / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.slow
def test_engines_and_int8(bundle: Bundle, checkpoints: dict[int, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    checkpoint = open_checkpoint(checkpoints[2])
    built = build(checkpoint, folder, "fp16", EngineRequest("tensorrt-rtx", ("8.9",))).bundle
    for name, component in built.manifest.components.items():
        (engine,) = component.engines
        assert engine.precision == ("fp32" if name in ("step", "guided_step") else "fp16")
    requests = ({"prompts": "a red circle"}, {"prompts": "the photo"})
    settings = CalibrationSettings(requests, requests, steps=4, samples=2, trial_steps=4, min_psnr=15.0)
    built = build(checkpoint, folder, options=BuildOptions("int8", calibration=settings)).bundle
    assert built.precision == "int8" and built.manifest.components["unet"].graphs["int8"] == "unet/int8.onnx"
    with LatentDiffusionPipeline.from_bundle(built, precision="int8", backend="onnxruntime") as pipe:
        assert ours(pipe, 0, PROMPTS, num_inference_steps=4).std() > 10


def test_the_command_line(
    bundle: Bundle, checkpoints: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    assert main(["verify", str(folder), "--against", str(checkpoints[2]), "--steps", "3", "--json"]) == 0
    image = tmp_path / "out.png"
    options = ["--steps", "3", "--seed", "1", "--negative-prompt", "red", "--clip-skip", "1"]
    assert main(["generate", str(folder), "a photo", *options, "--guidance-rescale", "0.5", "-o", str(image)]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert image.is_file() and "stable_diffusion" in capsys.readouterr().out
