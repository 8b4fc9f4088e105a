"""The safety checker of Stable Diffusion: flags and images equal those of diffusers' pipeline."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import CLIPConfig, CLIPImageProcessor

from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.families import open_checkpoint
from ldm_export.families.safety_checker import checker_spec, without_safety_checker
from ldm_export.families.stable_diffusion import describe
from ldm_runtime import Bundle, LatentDiffusionPipeline, Request
from ldm_runtime.backends.lazy import LazyBackend
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.conditioning import SafetyChecker
from ldm_runtime.errors import CheckpointError
from ldm_runtime.http.submission import flag_of
from ldm_runtime.triton.response_tensors import response_tensors
from ldm_runtime.triton.tensors import output_fields
from tests.support.checkpoints import edit_json
from tests.support.shared import SharedFolders
from tests.support.torch_pipeline import TorchBackend, torch_pipeline

SIDE = 30
PROMPTS = ["a red circle!", "the photo, green", "a", "green", "red red", "circle"]
STEPS: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}


def checker(seed: int = 0) -> StableDiffusionSafetyChecker:
    """A small random checker that flags nothing."""
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(projection_dim=16, vision_config={**vision, "image_size": SIDE, "patch_size": 6})  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = StableDiffusionSafetyChecker(config).eval()
        for name, parameter in module.named_parameters():
            if name.endswith("embeds"):
                parameter.data = torch.randn_like(parameter)
            elif "weights" not in name and "norm" not in name:
                parameter.data *= 4  # at the usual 0.02 all images would look alike
    return module


def whole_pipeline(folder: Path) -> Any:
    """diffusers' pipeline of a checkpoint, with its safety checker."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, seed: int = 1) -> Any:
    with torch.random.fork_rng(devices=[]):
        return pipeline(PROMPTS, generator=torch.manual_seed(seed), **STEPS)


def pixels(images: Any) -> NDArray[np.int64]:
    return np.stack([np.asarray(image, np.int64) for image in images])


@pytest.fixture(scope="module")
def checked(sd2_checkpoint: Path, shared: SharedFolders) -> Path:
    """A checkpoint whose checker flags about half of the images; read-only."""

    def write(folder: Path) -> None:
        shutil.copytree(sd2_checkpoint, folder, dirs_exist_ok=True)
        extractor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
        images = theirs(whole_pipeline(folder)).images
        module = checker()
        with torch.inference_mode():
            given = extractor(images, return_tensors="pt").pixel_values
            scores = cosine_distance(module.visual_projection(module.vision_model(given)[1]), module.concept_embeds)
        ordered = scores[:, 4].sort().values
        place = int((ordered[2:5] - ordered[1:4]).argmax()) + 1
        module.concept_embeds_weights.data[4] = ordered[place : place + 2].mean()
        module.save_pretrained(folder / "safety_checker")
        extractor.save_pretrained(folder / "feature_extractor")
        edit_json(
            folder / "model_index.json",
            safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
            feature_extractor=["transformers", "CLIPImageProcessor"],
        )

    return shared.once("sd2_checked", write)


def test_images_and_flags_equal_diffusers(checked: Path, tmp_path: Path) -> None:
    expected = theirs(whole_pipeline(checked))
    assert 0 < sum(expected.nsfw_content_detected) < len(PROMPTS)
    checkpoint = open_checkpoint(checked)
    with torch_pipeline(checkpoint, tmp_path / "files") as pipe:
        result = pipe(PROMPTS, seed=1, **STEPS)
        assert result.flagged == tuple(expected.nsfw_content_detected)
        assert np.abs(pixels(result.images) - pixels(expected.images)).max() <= 1
        fields = [field.name for field in output_fields(pipe.model)]
        with BatchScheduler(pipe, Limits(max_rows=8)) as scheduler:
            job = scheduler.submit(Request(PROMPTS, seed=1, **STEPS)).result(60)
        assert np.array_equal(job.images, pixels(result.images)) and job.flagged == result.flagged
        assert [flag_of(job, index) for index in range(len(PROMPTS))] == [{"flagged": one} for one in result.flagged]
        assert fields.count("FLAGGED") == 1
        assert response_tensors(job, 2, {"FLAGGED"})["FLAGGED"].tolist() == list(result.flagged)
    with torch_pipeline(without_safety_checker(checkpoint), tmp_path / "others") as pipe:
        free = pipe(PROMPTS, seed=1, **STEPS)
        assert free.flagged is None and (pixels(free.images).max(axis=(1, 2, 3)) > 0).all()
        assert "FLAGGED" not in [field.name for field in output_fields(pipe.model)]


def test_a_checker_that_is_switched_off_is_not_loaded(checked: Path, tmp_path: Path) -> None:
    with torch_pipeline(open_checkpoint(checked), tmp_path / "files") as pipe:
        for on in (True, False):
            lazy = {
                name: LazyBackend(pipe.model.components[name], partial(dict.get, pipe.backends, name))  # type: ignore[arg-type]
                for name in pipe.backends
            }
            files = partial(Path, tmp_path, "files")
            with LatentDiffusionPipeline(pipe.model, lazy, files, safety_checker=on) as other:
                other.load()
                assert {name for name, backend in lazy.items() if not backend.is_loaded} == (
                    set() if on else {"safety_checker"}
                )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**32 - 1))
def test_images_are_prepared_as_by_transformers(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    edge = SIDE + seed % 5
    (expected,) = CLIPImageProcessor(
        size={"shortest_edge": edge}, crop_size=SIDE, do_normalize=False, do_rescale=False
    )(image, return_tensors="np", input_data_format="channels_last").pixel_values
    backend = TorchBackend(checker_spec({"image_size": SIDE}), torch.nn.Identity())
    assert np.array_equal(SafetyChecker(backend, edge)._pixels(image)[0], expected.astype(np.float32))


def test_checkpoints_that_do_not_fit(checked: Path, tmp_path: Path) -> None:
    for name, change, message in (
        ("mean", {"image_mean": [0.5, 0.5, 0.5]}, "expected CLIP's preparation of images"),
        ("crop", {"crop_size": 20}, "expected CLIP's preparation of images"),
        ("older", {"size": SIDE, "crop_size": SIDE}, None),
    ):
        folder = Path(shutil.copytree(checked, tmp_path / name))
        edit_json(folder / "feature_extractor/preprocessor_config.json", **change)
        if message is None:
            describe(open_checkpoint(folder))
        else:
            with pytest.raises(CheckpointError, match=message):
                describe(open_checkpoint(folder))
    shutil.rmtree(folder / "feature_extractor")
    with pytest.raises(CheckpointError, match="a safety_checker but no feature_extractor"):
        describe(open_checkpoint(folder))


@pytest.mark.slow
def test_the_bundle(checked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = build(open_checkpoint(checked), tmp_path / "bundle", "fp16").bundle
    graphs = bundle.manifest.components["safety_checker"].graphs
    assert graphs == dict.fromkeys(("fp32", "fp16"), "safety_checker/fp32.onnx")
    expected = theirs(whole_pipeline(checked))
    for precision in ("fp32", "fp16"):
        with LatentDiffusionPipeline.from_bundle(Bundle.open(tmp_path / "bundle"), precision=precision) as pipe:
            assert pipe(PROMPTS, seed=1, **STEPS).flagged == tuple(expected.nsfw_content_detected)
    folder, flagged = str(tmp_path / "bundle"), PROMPTS[expected.nsfw_content_detected.index(True)]
    assert main(["verify", folder, "--against", str(checked), "--steps", "2"]) == 0
    command = ["generate", folder, flagged, "--steps", "2", "-o", str(tmp_path / "a.png"), "--json", "--seed", "1"]
    capsys.readouterr()
    assert main(command) == 0
    assert len(json.loads(capsys.readouterr().out)["flagged"]) == 1
    assert main([*command, "--no-safety-checker"]) == 0
    out, err = capsys.readouterr()
    assert "flagged" not in json.loads(out) and "safety checker: it is off" in err
