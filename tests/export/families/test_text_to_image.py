"""Text-to-image: specs derive from a checkpoint's configs, and the text encoder computes what diffusers computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ldm_export.bundle.build import build
from ldm_export.cli import main
from ldm_export.families import family_named, family_of, open_checkpoint
from ldm_export.families.text_to_image import TEXT_TO_IMAGE, ModelShape, TextEncoder, model_shape
from ldm_export.graph.wrappers import Decoder, UNet
from ldm_export.quality.verification import verify
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.errors import CheckpointError, SpecError
from ldm_runtime.model import Latents, check_model
from ldm_runtime.specs import Axis, dummy_inputs
from tests.support.checkpoints import VOCABULARY, edit_json, random_checkpoint, tiny_modules

TINY = ModelShape(tokens=77, context_width=24, latents=Latents(4, 8), latent_size=(8, 8), image_channels=3)
PUBLISHED = ModelShape(tokens=77, context_width=1280, latents=Latents(4, 8), latent_size=32, image_channels=3)


def test_the_family_is_recognised_by_todays_and_older_pipeline_names() -> None:
    for name in ("LDMTextToImagePipeline", "LatentDiffusionPipeline", "LatentDiffusion"):
        assert family_of({"_class_name": name}) is TEXT_TO_IMAGE
    assert family_named("text_to_image") is TEXT_TO_IMAGE
    for index in ({}, {"_class_name": None}, {"_class_name": ["LDMTextToImagePipeline"]}, {"_class_name": "Flux"}):
        with pytest.raises(CheckpointError, match=r"expected LDMTextToImagePipeline, StableDiff"):
            family_of(index)
    with pytest.raises(CheckpointError, match=r"family: got 'video', expected one of text_to_image"):
        family_named("video")


def test_a_checkpoint_is_described_whole(tiny_checkpoint: Path) -> None:
    model = TEXT_TO_IMAGE.describe(open_checkpoint(tiny_checkpoint))
    check_model(model)
    assert model.components == TINY.specs() and model.latents == TINY.latents
    assert [entry.kind for entry in model.conditioning] == ["text"]
    assert model.guidance == ("unconditional", "conditional")
    assert TEXT_TO_IMAGE.requests(["a"]) == ({"prompts": "a"},)


def test_shapes_of_the_published_model() -> None:
    specs = PUBLISHED.specs()
    lines = {name: [*map(str, spec.inputs), "->", *map(str, spec.outputs)] for name, spec in specs.items()}
    assert lines == {
        "text_encoder": ["input_ids: int64 [batch, 77]", "->", "context: float32 [batch, 77, 1280]"],
        "unet": [
            "sample: float32 [batch, 4, height, width]",
            "timestep: int64 [batch]",
            "context: float32 [batch, 77, 1280]",
            "->",
            "noise_pred: float32 [batch, 4, height, width]",
        ],
        "decoder": ["latents: float32 [batch, 4, height, width]", "->", "image: float32 [batch, 3, 8*height, 8*width]"],
    }
    assert {name: spec.name for name, spec in specs.items()} == {name: name for name in specs}


@pytest.mark.parametrize(
    ("which", "batch", "size"), [("min", 1, (2, 2)), ("opt", 1, (32, 32)), ("max", 32, (128, 128))]
)
def test_rows_are_twice_the_batch_and_pixels_eight_times_the_latents(which: str, batch: int, size) -> None:
    specs = PUBLISHED.specs()
    rows = batch if which == "min" else 2 * batch  # without guidance a single row will do
    assert specs["text_encoder"].inputs[0].bounds(which) == (batch, 77)
    assert [tensor.bounds(which) for tensor in specs["unet"].inputs] == [(rows, 4, *size), (rows,), (rows, 77, 1280)]
    assert specs["unet"].outputs[0].bounds(which) == (rows, 4, *size)
    assert specs["decoder"].inputs[0].bounds(which) == (batch, 4, *size)
    assert specs["decoder"].outputs[0].bounds(which) == (batch, 3, 8 * size[0], 8 * size[1])


def test_other_factors_channels_and_sizes() -> None:
    shape = ModelShape(16, 24, Latents(8, 4), latent_size=64, image_channels=1)
    latents, image = shape.specs()["decoder"].inputs[0], shape.specs()["decoder"].outputs[0]
    height = Axis("height", 2, 64, 256)
    assert latents.shape[1:3] == (8, height)
    assert image.shape[1:3] == (1, 4 * height)


@pytest.mark.parametrize("vq", [False, True])
@pytest.mark.parametrize("layout", ["current", "older"])
def test_shape_of_a_checkpoint(tmp_path: Path, vq: bool, layout: str) -> None:
    assert model_shape(open_checkpoint(random_checkpoint(tmp_path / "tiny", vq=vq, layout=layout)).configs()) == TINY


def test_shape_follows_the_configs(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny")
    edit_json(folder / "bert/config.json", max_position_embeddings=512, d_model=32)
    edit_json(folder / "unet/config.json", cross_attention_dim=32, sample_size=16, in_channels=6, out_channels=6)
    edit_json(
        folder / "vqvae/config.json",
        latent_channels=6,
        out_channels=1,
        block_out_channels=[32, 32, 64],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
    )
    assert model_shape(open_checkpoint(folder).configs()) == ModelShape(
        77, 32, Latents(6, 4), (16, 16), image_channels=1
    )
    edit_json(folder / "bert/config.json", max_position_embeddings=20)
    assert model_shape(open_checkpoint(folder).configs()).tokens == 20


def test_text_encoder_gives_the_last_hidden_state() -> None:
    theirs = tiny_modules()["bert"]
    ids = torch.randint(0, len(VOCABULARY), (3, 77), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        context = TextEncoder(copy.deepcopy(theirs)).eval()(ids)
        assert torch.equal(context, theirs(ids)[0])
    assert context.shape == (3, 77, 24) and context.std() > 0.1


def test_the_smallest_inputs_of_every_spec_run() -> None:
    modules = tiny_modules()
    wrapped = {"text_encoder": TextEncoder(modules["bert"]), "unet": UNet(modules["unet"])}
    wrapped["decoder"] = Decoder(modules["vqvae"])
    for name, spec in TINY.specs().items():
        feed = [torch.from_numpy(array) for array in dummy_inputs(spec, "min").values()]
        with torch.inference_mode():
            assert tuple(wrapped[name].eval()(*feed).shape) == spec.outputs[0].bounds("min")


SCHEDULERS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {"skip_prk_steps": True},
    "DPMSolverMultistepScheduler": {"solver_order": 2},
    "DDPMScheduler": {"clip_sample": False},
    "UniPCMultistepScheduler": {"disable_corrector": [], "sigma_min": None},
    "LCMScheduler": {},
    "TCDScheduler": {},
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' DPM-Solver
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_images_of_other_schedulers_equal_diffusers(scheduler: str, tiny: Path, bundle_copy: Path) -> None:
    edit_json(tiny / "model_index.json", scheduler=["diffusers", scheduler])
    changes = {"_class_name": scheduler, "clip_sample": ...} | SCHEDULERS[scheduler]
    edit_json(tiny / "scheduler/scheduler_config.json", **changes)
    checkpoint = open_checkpoint(tiny)
    bundle = build(checkpoint, bundle_copy).bundle  # the graphs are kept
    assert bundle.manifest.scheduler["class"] == scheduler
    result = verify(bundle, checkpoint, [{"prompts": "a red circle"}], steps=7)
    assert result.failures == []
    assert np.asarray(result.images[0].ours).std() > 1


@pytest.mark.parametrize(
    "scheduler",
    ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"],
)
def test_schedulers_that_scale_the_latents_are_refused(scheduler: str, tiny: Path, tmp_path: Path) -> None:
    edit_json(tiny / "model_index.json", scheduler=["diffusers", scheduler])
    edit_json(tiny / "scheduler/scheduler_config.json", _class_name=scheduler, clip_sample=...)
    with pytest.raises(
        SpecError, match=rf"^scheduler: got {scheduler}, but diffusers' LDMTextToImagePipeline does not"
    ):
        build(open_checkpoint(tiny), tmp_path / "bundle")


@pytest.mark.parametrize("scheduler", ["UniPCMultistepScheduler", "LCMScheduler"])
def test_a_requested_scheduler_equals_from_config(scheduler: str, tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    theirs = TEXT_TO_IMAGE.reference(open_checkpoint(tiny_checkpoint))
    own = diffusers.DDIMScheduler.from_pretrained(tiny_checkpoint / "scheduler")
    theirs.scheduler = getattr(diffusers, scheduler).from_config(own.config)
    options: dict[str, Any] = {"num_inference_steps": 5, "eta": 0.3, "guidance_scale": 6.0}
    with LatentDiffusionPipeline.from_bundle(tiny_bundle, backend="onnxruntime", device="cpu") as pipeline:
        ours = pipeline("a red circle", seed=3, scheduler=scheduler, **options).images[0]
    size = {"prompts": "a red circle", "height": ours.height, "width": ours.width}
    with torch.random.fork_rng(devices=[]):
        expected = TEXT_TO_IMAGE.reference_image(theirs, {**size, **options}, torch.manual_seed(3))
    assert np.abs(np.asarray(ours, np.int16) - np.asarray(expected, np.int16)).max() <= 1


def test_the_command_line_selects_a_scheduler(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "generate",
        str(tiny_bundle),
        "a red circle",
        "--seed",
        "1",
        "--steps",
        "4",
        "--backend",
        "onnxruntime",
    ]
    images = []
    for name in ("DDIMScheduler", "TCDScheduler"):
        output = tmp_path / f"{name}.png"
        assert main([*arguments, "--scheduler", name, "-o", str(output)]) == 0
        images.append(output.read_bytes())
    assert main([*arguments, "-o", str(tmp_path / "own.png")]) == 0
    assert (tmp_path / "own.png").read_bytes() == images[0] != images[1]
    assert main([*arguments, "--scheduler", "EulerDiscreteScheduler", "-o", str(tmp_path / "no.png")]) != 0
    assert "diffusers' LDMTextToImagePipeline does not scale the latents" in capsys.readouterr().err
