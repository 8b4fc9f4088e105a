"""Checkpoints that are no Stable Diffusion 1.x or 2.x: one line says what they are and what is supported."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ldm_export.families import FAMILIES, open_checkpoint
from tests.support.checkpoints import edit_json
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion import stable_diffusion_checkpoint

PIPELINES = {
    "StableDiffusionXLInstructPix2PixPipeline": "another pipeline of Stable Diffusion XL",
    "StableDiffusion3Pipeline": "Stable Diffusion 3, a transformer",
    "StableDiffusionControlNetPipeline": "with a ControlNet",
    "StableDiffusionDepth2ImgPipeline": "Stable Diffusion with a depth map",
    "FluxPipeline": "FLUX, a transformer",
    "DDPMPipeline": "diffusion of pixels, not of latents",
}
CONFIGS = {
    "an autoencoder alone": {"_class_name": "AutoencoderKL"},
    "a ControlNet, an addition to a checkpoint": {"_class_name": "ControlNetModel"},
    "a text encoder alone": {"architectures": ["CLIPTextModel"]},
    "one 'FluxTransformer2DModel' alone": {"_class_name": "FluxTransformer2DModel"},
}
FILES = {
    "LoRA weights, an addition to a checkpoint": "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
    "LoRA weights": "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight",
    "a ControlNet": "control_model.input_blocks.0.0.weight",
    "an autoencoder alone": "first_stage_model.decoder.conv_in.weight",
    "FLUX, a transformer": "double_blocks.0.img_attn.qkv.weight",
    "Stable Diffusion 3, a transformer": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "the refiner of Stable Diffusion XL": "conditioner.embedders.0.model.ln_final.weight",
    "a UNet of diffusers alone": "down_blocks.0.resnets.0.conv1.weight",
    "an embedding of textual inversion": "emb_params",
}
Refused = Callable[..., None]


@pytest.mark.parametrize("name", PIPELINES)
def test_other_pipelines(name: str, tmp_path: Path, refused: Refused) -> None:
    if any(name in family.pipelines for family in FAMILIES):
        pytest.fail(f"{name} is supported")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/model_index.json").write_text(json.dumps({"_class_name": name}))
    message = f"model_index.json is of a '{name}' ({PIPELINES[name]}), expected LDMTextToImagePipeline"
    refused("build", "checkpoint", "-o", "bundle", message=message)


@pytest.mark.parametrize("what", CONFIGS)
def test_parts_alone(what: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/config.json").write_text(json.dumps(CONFIGS[what]))
    refused("build", "part", "-o", "bundle", message=f"part holds {what}, expected a whole checkpoint")


def test_a_folder_of_lora_weights(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "lora").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "lora/pytorch_lora_weights.safetensors")
    refused("build", "lora", "-o", "bundle", message="lora holds LoRA weights, an addition to a checkpoint")


@pytest.mark.parametrize("what", FILES)
def test_other_files(what: str, tmp_path: Path, refused: Refused) -> None:
    save_file({FILES[what]: torch.zeros(1)}, tmp_path / "file.safetensors")
    refused("build", "file.safetensors", "-o", "bundle", message=f"file.safetensors holds {what}")


def test_a_missing_safety_checker_is_named(
    shared: SharedFolders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = shared.once("sd1", lambda folder: stable_diffusion_checkpoint(folder, 1))
    with caplog.at_level(logging.WARNING):
        open_checkpoint(source)
        assert not caplog.records
        folder = Path(shutil.copytree(source, tmp_path / "copy"))
        edit_json(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
        open_checkpoint(folder)
    assert "safety_checker is missing, so that it is not exported" in caplog.text
