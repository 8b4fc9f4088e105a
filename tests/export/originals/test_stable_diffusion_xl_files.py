"""Stable Diffusion XL in one file: the same modules, tensors and images as the diffusers folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.families import family_named, open_checkpoint
from ldm_export.families.description import described
from ldm_export.originals import open_original
from ldm_export.originals.convert import convert
from ldm_export.originals.published import STABLE_DIFFUSION_XL
from ldm_export.originals.unet_config import added_config, unet_config
from ldm_export.originals.unet_shape import unet_shape
from ldm_runtime.errors import CheckpointError
from tests.support.compvis_states import State, autoencoder_state, open_clip_state, unet_state
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion_xl import stable_diffusion_xl_checkpoint
from tests.support.torch_pipeline import torch_pipeline

UNET = "model.diffusion_model."
MODULES = ("text_encoder", "text_encoder_2", "unet", "autoencoder")


@pytest.fixture(scope="module")
def folder(shared: SharedFolders) -> Path:
    """A diffusers folder whose attentions have two transformer blocks; read-only."""
    return shared.once("sdxl_depth_2", lambda folder: stable_diffusion_xl_checkpoint(folder, depth=2))


def original(modules: dict[str, nn.Module]) -> State:
    """The state dict that the authors would have of a folder's modules."""
    text = modules["text_encoder"].state_dict()
    text_2 = modules["text_encoder_2"].state_dict()
    projection = text_2.pop("text_projection.weight")
    second = open_clip_state({name.removeprefix("text_model."): tensor for name, tensor in text_2.items()})
    second |= {"text_projection": projection.T, "logit_scale": torch.tensor(1.0)}
    parts: dict[str, State] = {
        UNET: unet_state(modules["unet"], 1),
        "first_stage_model.": autoencoder_state(modules["autoencoder"], 2),
        "conditioner.embedders.0.transformer.text_model.": text,
        "conditioner.embedders.1.model.": second,
    }
    return {f"{prefix}{name}": tensor for prefix, part in parts.items() for name, tensor in part.items()}


@pytest.fixture(scope="module")
def state(folder: Path) -> State:
    """The state dict of ``folder``; read-only."""
    return original({name: load_module(open_checkpoint(folder), name) for name in MODULES})


def saved(state: State, file: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, file)
    return file


def test_the_file_equals_the_folder(folder: Path, state: State, tmp_path: Path) -> None:
    expected = open_checkpoint(folder)
    opened = open_original(saved(state, tmp_path / "xl.safetensors"), tokenizer=folder / "tokenizer")
    assert (opened.family, opened.defaults and opened.defaults.guidance_scale) == ("stable_diffusion_xl", 5.0)
    assert opened.configs()["text_encoder_2"] == expected.configs()["text_encoder_2"]
    for module in MODULES:
        ours, theirs = (load_module(checkpoint, module).state_dict() for checkpoint in (opened, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), module


def test_an_inpainting_model(state: State, folder: Path, tmp_path: Path) -> None:
    first = f"{UNET}input_blocks.0.0.weight"
    wide = torch.cat([state[first], torch.ones(state[first].shape[0], 5, 3, 3)], dim=1)
    opened = open_original(saved(state | {first: wide}, tmp_path / "xl.safetensors"), tokenizer=folder / "tokenizer")
    assert (opened.family, opened.configs()["unet"]["in_channels"]) == ("stable_diffusion_xl", 9)
    assert torch.equal(load_module(opened, "unet").get_parameter("conv_in.weight"), wide)
    family = family_named(opened.family)
    assert family.pipeline_of(opened) == "StableDiffusionXLInpaintPipeline"
    model = described(family, opened)
    assert {entry.kind: entry.inputs for entry in model.conditioning}["start_image"] == ("masked_image",)


def test_images_of_the_converted_file(folder: Path, state: State, tmp_path: Path) -> None:
    opened = open_original(saved(state, tmp_path / "xl.safetensors"), tokenizer=folder / "tokenizer")
    convert(opened, tmp_path / "converted")
    reference = StableDiffusionXLPipeline.from_pretrained(tmp_path / "converted")
    reference.set_progress_bar_config(disable=True)
    assert (reference.tokenizer.pad_token, reference.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    sizes = {"height": 16, "width": 24, "num_inference_steps": 4}
    with torch.random.fork_rng(devices=[]):
        (theirs,) = reference(["a red circle"], generator=torch.manual_seed(4), **sizes).images
    with torch_pipeline(opened, tmp_path / "files") as pipe:
        (ours,) = pipe(["a red circle"], seed=4, **sizes).images
    difference = np.abs(np.asarray(ours, np.int64) - np.asarray(theirs, np.int64))
    assert difference.max() <= 1 and np.asarray(theirs).std() > 10


def test_velocity_and_formulations(folder: Path, state: State, tmp_path: Path) -> None:
    opened = open_original(
        saved(state | {"v_pred": torch.zeros(0)}, tmp_path / "v.safetensors"), tokenizer=folder / "tokenizer"
    )
    assert opened.scheduler_config["prediction_type"] == "v_prediction"
    with pytest.raises(CheckpointError, match="a model in EDM's formulation, whose scheduler is not supported"):
        open_original(saved(state | {"edm_mean": torch.zeros(4)}, tmp_path / "edm.safetensors"))


def test_the_config_of_the_published_unet() -> None:
    options = {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        unet = UNet2DConditionModel(**options)
    shapes = {f"{UNET}{name}": tuple(one.shape) for name, one in unet_state(unet, 2).items()}

    def load() -> torch.Tensor:
        raise AssertionError("values are not needed")

    shape = unet_shape({name: StoredTensor("x", name, Path("x"), one, "float16", load) for name, one in shapes.items()})
    config = unet_config(shape, STABLE_DIFFUSION_XL.heads, 128) | added_config(shape, 1280)
    assert {name: config[name] for name in options} == options


def test_no_yaml(folder: Path, state: State, tmp_path: Path, refused: Callable[..., None]) -> None:
    saved(state, tmp_path / "xl.safetensors")
    (tmp_path / "xl.yaml").write_text("model: {params: {unet_config: {params: {model_channels: 32}}}}")
    given = ("build", "xl.safetensors", "--config", "xl.yaml", "--tokenizer", folder / "tokenizer", "-o", "bundle")
    refused(*given, message="Stable Diffusion XL needs no yaml; leave --config out")
