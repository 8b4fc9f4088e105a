"""Checkpoints in every form that diffusers loads: the bundles draw what diffusers' pipeline draws of them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LDMTextToImagePipeline, UNet2DConditionModel
from PIL import Image

from ldm_export.bundle.build import build
from ldm_export.checkpoint.diffusers_parts import context_widths
from ldm_export.cli import main
from ldm_export.families import family_named, open_checkpoint
from ldm_export.quality.verification import verify
from ldm_export.quality.verification_page import page
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from ldm_runtime.specs import Axis
from tests.support.checkpoints import edit_json
from tests.support.torch_pipeline import torch_pipeline

OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "eta": 0.3}
PROMPT = "a red circle"
UNET: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def replace(folder: Path, component: str, make: Callable[[], Any]) -> None:
    """Replace a component of a checkpoint by a model with random weights."""
    shutil.rmtree(folder / component)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        make().save_pretrained(folder / component)


def theirs(folder: Path, **options: Any) -> np.ndarray:
    """Generate the image of a checkpoint with diffusers."""
    pipeline = LDMTextToImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return np.asarray(pipeline(PROMPT, **OPTIONS, **options).images[0])


def ours(bundle: Bundle, **options: Any) -> np.ndarray:
    """Generate the image of a bundle on ONNX Runtime."""
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime", threads=1) as pipeline:
        return np.asarray(pipeline(PROMPT, seed=0, **OPTIONS, **options).images[0])


def built(folder: Path, unchanged: Path, target: Path) -> Bundle:
    """Build a checkpoint; stages that it shares with the bundle ``unchanged`` are taken from there."""
    shutil.copytree(unchanged, target)
    return build(open_checkpoint(folder), target).bundle


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    assert other.std() > 10
    assert one.shape == other.shape
    assert np.abs(one.astype(int) - other.astype(int)).max() <= 1


OTHER_UNET: dict[str, Any] = {
    "mid_block_type": None,
    "sample_size": [12, 8],
    "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
    "encoder_hid_dim": 24,
    "cross_attention_dim": 32,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
}
"""No middle, a pair of sizes, resnets that upsample, attention on the way down alone, states that are projected and
added to the time embedding."""


def test_another_form_of_a_unet(tiny: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    replace(tiny, "unet", lambda: UNet2DConditionModel(**{**UNET, **OTHER_UNET}))
    bundle = built(tiny, tiny_bundle, tmp_path / "bundle")
    expected = theirs(tiny, height=96, width=64)
    assert_same(ours(bundle, height=96, width=64), expected)
    assert ours(bundle).shape == (8 * 12, 8 * 8, 3)


def test_a_width_for_each_level(tiny: Path, tmp_path: Path) -> None:
    widths = {"mid_block_type": None, "cross_attention_dim": [24, 99]}
    replace(tiny, "unet", lambda: UNet2DConditionModel(**{**UNET, **widths}))
    with torch_pipeline(open_checkpoint(tiny), tmp_path / "files") as pipeline:
        assert_same(np.asarray(pipeline(PROMPT, seed=0, **OPTIONS).images[0]), theirs(tiny))


def test_a_unet_without_a_size_has_that_of_the_autoencoder(tiny: Path) -> None:
    edit_json(tiny / "unet/config.json", sample_size=None)
    edit_json(tiny / "vqvae/config.json", sample_size=96)
    checkpoint = open_checkpoint(tiny)
    sample = family_named(checkpoint.family).describe(checkpoint).components["unet"].inputs[0]
    assert [axis.opt for axis in sample.shape if isinstance(axis, Axis)][1:] == [12, 12]


def test_other_factor_and_grey_images(
    tiny: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An autoencoder of factor 4 with one channel; diffusers takes sizes of factor 8 for it all the same."""
    replace(
        tiny,
        "vqvae",
        lambda: AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(32, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
        ),
    )
    bundle = built(tiny, tiny_bundle, tmp_path / "bundle")
    expected = theirs(tiny, height=96, width=64)
    assert expected.shape == (48, 32)
    assert_same(ours(bundle, height=48, width=32), expected)
    checked = verify(bundle, open_checkpoint(tiny), [{"prompts": PROMPT, "width": 48}], steps=2)
    assert checked.failures == [] and [one.ours.mode for one in checked.images] == ["L"]
    assert page(checked).count("data:image/png;base64") >= 3
    output = tmp_path / "out.png"
    options = ["--steps", "1", "--backend", "onnxruntime", "-o", str(output)]
    assert main(["generate", str(bundle.folder), PROMPT, PROMPT, *options]) == 0
    with Image.open(output) as image:
        assert (image.mode, image.size) == ("L", (66, 32))
    assert main(["triton", str(bundle.folder), "-o", str(tmp_path / "models"), "--quiet"]) == 0
    config = (tmp_path / "models/ldm/config.pbtxt").read_text()
    assert re.search(r'"IMAGE"\s+data_type: TYPE_UINT8\s+dims: \[-1, -1, -1, 1\]', config), config


EMPTY = ("", "   ", "a red circle " * 1000)


def test_empty_blank_and_long_prompts(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    pipeline = LDMTextToImagePipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    bundle = Bundle.open(tiny_bundle)
    with LatentDiffusionPipeline.from_bundle(bundle, precision="fp32", backend="onnxruntime", threads=1) as mine:
        for prompt in EMPTY:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                expected = np.asarray(pipeline(prompt, **OPTIONS).images[0])
            assert_same(np.asarray(mine(prompt, seed=0, **OPTIONS).images[0]), expected)


def test_widths_of_the_levels_that_attend() -> None:
    unet = {**UNET, "encoder_hid_dim": None, "mid_block_type": "UNetMidBlock2DCrossAttn"}
    assert context_widths(unet) == {24}
    assert context_widths({**unet, "cross_attention_dim": (24, 32)}) == {24, 32}
    assert context_widths({**unet, "cross_attention_dim": (24, 32), "mid_block_type": None}) == {24}
    assert context_widths({**unet, "cross_attention_dim": (24, 32), "encoder_hid_dim": 16}) == {16}


def test_values_that_diffusers_takes_too(tiny: Path) -> None:
    """Null for names and switches, 0 and 1 for switches, no padding token, counts of layers as nested lists."""
    edit_json(tiny / "bert/config.json", pad_token_id=None, scale_embedding=0)
    edit_json(tiny / "unet/config.json", flip_sin_to_cos=1, attention_type=None, upcast_attention=None)
    edit_json(tiny / "unet/config.json", transformer_layers_per_block=[[1], [1]])
    edit_json(tiny / "scheduler/scheduler_config.json", clip_sample=0, set_alpha_to_one=1)
    checkpoint = open_checkpoint(tiny)
    text, unet = (checkpoint.components[name].config for name in ("text_encoder", "unet"))
    assert text["pad_token_id"] is None and text["scale_embedding"] is False
    assert (unet["flip_sin_to_cos"], unet["attention_type"], unet["upcast_attention"]) == (True, None, None)
    assert unet["transformer_layers_per_block"] == ((1,), (1,))
    assert checkpoint.scheduler_config["clip_sample"] is False
    assert family_named(checkpoint.family).describe(checkpoint).scheduler["set_alpha_to_one"] is True
