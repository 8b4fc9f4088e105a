"""Stable Diffusion in one file of the authors: the same modules, tensors and images as the diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.families import open_checkpoint
from ldm_export.originals import open_original
from ldm_export.originals.convert import convert
from ldm_export.originals.recognition import recognise
from ldm_export.originals.yaml_config import read_yaml
from ldm_export.textual_inversion import parse_embedding, with_embeddings
from ldm_runtime.errors import CheckpointError
from tests.support.compvis_checkpoints import CompVis
from tests.support.compvis_states import (
    State,
    autoencoder_state,
    joined,
    open_clip_state,
    unet_state,
    with_averages,
    with_schedule,
)
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion import LEVELS, stable_diffusion_checkpoint
from tests.support.torch_pipeline import torch_pipeline

MODULES = ("text_encoder", "unet", "autoencoder")
LAYERS = 3


def with_last_layer(state: State) -> State:
    """OpenCLIP's tensors with a last layer, which Stable Diffusion leaves out."""
    last = f"transformer.resblocks.{LAYERS - 1}."
    more = {name.replace(last, f"transformer.resblocks.{LAYERS}."): torch.ones_like(state[name]) for name in state}
    more = {name: tensor for name, tensor in more.items() if name not in state}
    return state | more | {"text_projection": torch.ones(4, 4), "logit_scale": torch.tensor(1.0)}


def original(folder: Path, version: int) -> CompVis:
    """The file that the authors would have of a folder."""
    checkpoint = open_checkpoint(folder)
    modules = {name: load_module(checkpoint, name) for name in MODULES}
    text = modules["text_encoder"].state_dict()
    if version == 1:
        condition = {f"transformer.text_model.{name}": tensor for name, tensor in text.items()}
        condition["transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        heads: dict[str, Any] = {"num_heads": 8}
    else:
        condition = {f"model.{name}": tensor for name, tensor in with_last_layer(open_clip_state(text)).items()}
        heads = {"num_head_channels": 16, "use_linear_in_transformer": True}
    state = joined(unet_state(modules["unet"], 1), autoencoder_state(modules["autoencoder"], LEVELS), condition)
    params: dict[str, Any] = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "image_size": 8,
        "scale_factor": 0.18215,
        "use_ema": False,
        "unet_config": {"params": {"model_channels": 32, "context_dim": 128, **heads}},
        "first_stage_config": {"params": {"embed_dim": 4}},
    }
    params |= {"parameterization": "v"} if version == 2 else {}
    return CompVis(modules, with_schedule(state, 0.00085, 0.012), params)


@pytest.fixture(scope="module")
def folders(shared: SharedFolders) -> dict[int, Path]:
    """Version -> diffusers folder; read-only."""
    return {
        number: shared.once(name, lambda folder, number=number: stable_diffusion_checkpoint(folder, number))
        for number, name in ((1, "sd1"), (2, "sd2_symmetric"))
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_the_file_equals_the_folder(folders: dict[int, Path], version: int, name: str, tmp_path: Path) -> None:
    made = original(folders[version], version)
    file = made.save(tmp_path)
    if name != "model.ckpt":
        file = tmp_path / name
        save_file({key: tensor.contiguous().clone() for key, tensor in made.state.items()}, file)
    opened = open_original(file, config=tmp_path / "model.yaml", tokenizer=folders[version] / "tokenizer")
    assert opened.family == "stable_diffusion"
    assert opened.scheduler_config["prediction_type"] == ("epsilon" if version == 1 else "v_prediction")
    expected = open_checkpoint(folders[version]).configs()
    assert opened.configs()["text_encoder"] == expected["text_encoder"]
    for module in MODULES:
        ours, theirs = load_module(opened, module).state_dict(), made.modules[module].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), module


@pytest.mark.parametrize("version", [1, 2])
def test_images_equal_diffusers(folders: dict[int, Path], version: int, tmp_path: Path) -> None:
    file = original(folders[version], version).save(tmp_path)
    opened = open_original(file, config=tmp_path / "model.yaml", tokenizer=folders[version] / "tokenizer")
    vectors = torch.randn(2, opened.configs()["text_encoder"]["hidden_size"], generator=torch.manual_seed(version))
    save_file({"<cat>": vectors}, tmp_path / "cat.safetensors")
    opened = with_embeddings(opened, [parse_embedding(str(tmp_path / "cat.safetensors"))])
    assert set(convert(opened, tmp_path / "converted")) >= {"text_encoder", "unet", "vae", "tokenizer", "scheduler"}
    reference = StableDiffusionPipeline.from_pretrained(tmp_path / "converted", requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    assert isinstance(reference.scheduler, DDIMScheduler)
    request: dict[str, Any] = {"eta": 0.5, "guidance_scale": 7.5, "num_inference_steps": 5, "negative_prompt": ["a"]}
    assert reference.tokenizer.tokenize("a <cat>")[-1] == "<cat>"
    assert torch.equal(reference.text_encoder.get_input_embeddings().weight[-2:], vectors)
    with torch.random.fork_rng(devices=[]):
        theirs = reference(["a red <cat>"], generator=torch.manual_seed(4), **request).images[0]
    with torch_pipeline(opened, tmp_path / "files") as pipe:
        (ours,) = pipe(["a red <cat>"], seed=4, **request).images
    difference = np.abs(np.asarray(ours, np.int64) - np.asarray(theirs, np.int64))
    assert difference.max() <= 1 and np.asarray(theirs).std() > 10


def test_an_inpainting_model(shared: SharedFolders, folders: dict[int, Path], tmp_path: Path) -> None:
    folder = shared.once("sd9", lambda folder: stable_diffusion_checkpoint(folder, 1, inpainting=True))
    opened = open_original(original(folder, 1).save(tmp_path), tmp_path / "model.yaml", folder / "tokenizer")
    assert opened.family == "stable_diffusion" and opened.configs()["unet"]["in_channels"] == 9
    convert(opened, tmp_path / "converted")
    assert json.loads((tmp_path / "converted/model_index.json").read_text())["_class_name"].endswith("InpaintPipeline")
    converted = open_checkpoint(tmp_path / "converted")
    ours, theirs = (load_module(one, "unet").state_dict() for one in (converted, open_checkpoint(folder)))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    shapes = published(folders[1], 1)
    shapes |= stored({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)})
    found = recognise(shapes)
    assert (found.kind, found.name, found.scale_factor) == ("stable_diffusion", "stable-diffusion-v1", 0.18215)


def test_moving_averages(folders: dict[int, Path], tmp_path: Path) -> None:
    made = original(folders[1], 1)
    made.state = with_averages(made.state)
    file, tokenizer = made.save(tmp_path), folders[1] / "tokenizer"
    plain = made.modules["unet"].state_dict()["conv_in.weight"]
    for weights, expected in ((None, plain), ("model", plain), ("ema", plain + 1)):  # use_ema is False in the yaml
        opened = open_original(file, tmp_path / "model.yaml", tokenizer, weights)
        assert torch.equal(load_module(opened, "unet").state_dict()["conv_in.weight"], expected)


def stored(shapes: dict[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    def load() -> torch.Tensor:
        raise AssertionError("values are not needed")

    return {name: StoredTensor("checkpoint", name, Path("x"), shape, "float32", load) for name, shape in shapes.items()}


def published(folder: Path, version: int) -> dict[str, StoredTensor]:
    """A state dict whose shapes are those of the published models where they are looked at, without a schedule."""
    made = {name: tuple(tensor.shape) for name, tensor in original(folder, version).state.items()}
    shapes = {name: shape for name, shape in made.items() if not name.startswith(("betas", "alphas"))}
    unet, context = "model.diffusion_model.", 768 if version == 1 else 1024
    level = {f"{unet}input_blocks.{i}": width for i, width in ((1, 320), (4, 640), (7, 1280), (10, 1280))}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith((f"{unet}in", f"{unet}out"))}
    for block, width in level.items():
        shapes[f"{block}.0.out_layers.3.weight"] = (width, width, 3, 3)
        if width != 1280 or block.endswith(".7"):
            shapes[f"{block}.1.norm.weight"] = (width,)
    shapes |= {f"{unet}input_blocks.{i}.0.bias": (1,) for i in range(12)}
    shapes |= {f"{unet}output_blocks.{i}.0.bias": (1,) for i in range(12)}
    shapes[f"{unet}output_blocks.2.1.conv.weight"] = (1280, 1280, 3, 3)
    shapes |= {f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3), f"{unet}out.2.weight": (4, 320, 3, 3)}
    shapes[f"{unet}input_blocks.1.0.emb_layers.1.weight"] = (320, 1280)
    shapes[f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight"] = (1280, context)
    text = "cond_stage_model.transformer.text_model.embeddings." if version == 1 else "cond_stage_model.model."
    shapes[f"{text}token_embedding.weight"] = (49408, context)
    return stored(shapes)


def test_the_published_model_needs_no_yaml(folders: dict[int, Path]) -> None:
    found = recognise(published(folders[1], 1))
    assert (found.kind, found.name) == ("stable_diffusion", "stable-diffusion-v1")
    assert (found.heads.number, found.image_size, found.scale_factor) == (8, 64, 0.18215)
    assert (found.linear_start, found.linear_end, found.prediction_type) == (0.00085, 0.012, "epsilon")
    assert replace(found.defaults).guidance_scale == 7.5


def test_version_2_needs_its_prediction(folders: dict[int, Path]) -> None:
    shapes = published(folders[2], 2)
    with pytest.raises(
        CheckpointError, match=r"Stable Diffusion 2, whose tensors do not tell .* --prediction-type v_pre"
    ):
        recognise(shapes)
    for kind, name, size in (("epsilon", "-base", 64), ("v_prediction", "", 96)):
        found = recognise(shapes, prediction_type=kind)
        assert (found.prediction_type, found.name, found.image_size) == (kind, f"stable-diffusion-v2{name}", size)
        assert (found.heads.channels, found.linear_start, found.scale_factor) == (64, 0.00085, 0.18215)


@pytest.mark.parametrize(("parameterization", "size"), [("eps", 64), ("v", 96)])
def test_the_yaml_of_version_2_does_not_tell_its_size(
    folders: dict[int, Path], tmp_path: Path, parameterization: str, size: int
) -> None:
    unet = {"image_size": 32, "model_channels": 320, "context_dim": 1024, "num_head_channels": 64}
    unet |= {"use_linear_in_transformer": True}
    params = {"image_size": 64, "scale_factor": 0.18215, "linear_start": 0.00085, "linear_end": 0.012}
    params |= {"parameterization": parameterization, "unet_config": {"params": unet}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    assert recognise(published(folders[2], 2), read_yaml(tmp_path / "model.yaml")).image_size == size


def test_a_prediction_other_than_that_of_the_yaml_is_refused(
    folders: dict[int, Path], tmp_path: Path, refused: Callable[..., None]
) -> None:
    original(folders[2], 2).save(tmp_path)
    given = ("build", "model.ckpt", "--config", "model.yaml", "-o", "bundle", "--tokenizer", folders[2] / "tokenizer")
    expected = "got --prediction-type epsilon, but model.yaml says v_prediction; leave it out"
    refused(*given, "--prediction-type", "epsilon", message=expected)
    expected = f"{folders[2]}: --prediction-type: for original checkpoint files; leave them out"
    refused("build", folders[2], "--prediction-type", "epsilon", "-o", "bundle", message=expected)


def test_a_prediction_for_a_file_without_a_yaml(folders: dict[int, Path]) -> None:
    shapes = published(folders[1], 1)
    assert recognise(shapes, prediction_type="v_prediction").prediction_type == "v_prediction"


def test_the_tokenizer_is_a_folder(folders: dict[int, Path], tmp_path: Path, refused: Callable[..., None]) -> None:
    original(folders[1], 1).save(tmp_path)
    given = ("build", "model.ckpt", "--config", "model.yaml", "-o", "bundle")
    refused(*given, message="the file holds no tokenizer; give the folder tokenizer of a diffusers checkpoint")
    refused(*given, "--tokenizer", tmp_path / "model.yaml", message="no vocab.json or tokenizer.json, expected the fol")


def test_a_parameterization_that_is_not_known(folders: dict[int, Path], tmp_path: Path) -> None:
    made = original(folders[1], 1)
    made.params["parameterization"] = "x0"
    file = made.save(tmp_path)
    with pytest.raises(CheckpointError, match="parameterization: got 'x0', expected eps or v"):
        open_original(file, config=tmp_path / "model.yaml", tokenizer=folders[1] / "tokenizer")
