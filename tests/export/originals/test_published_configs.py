"""Full-size models of the paper: names and shapes of their tensors tell the same as their yaml."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.families import family_named
from ldm_export.originals import open_model, open_yaml
from ldm_export.originals.recognition import described, recognise
from ldm_export.originals.yaml_config import read_yaml
from ldm_runtime.errors import CheckpointError
from tests.support.compvis_states import autoencoder_state, bert_state, joined, unet_state

CONFIGS = sorted((Path(__file__).parents[3] / "benchmarks" / "configs").glob("*.yaml"))
MILLIONS = {
    "txt2img-f8-large": 872,
    "text2img256": 404,
    "cin256-v2": 401,
    "cin256": 395,
    "celeba256": 274,
    "lsun_churches256": 295,
    "bsr_sr": 114,
    "inpainting_big": 387,
    "semantic_synthesis256": 215,
    "layout2img-openimages256": 246,
}
"""Parameters of each UNet, counted on the authors' modules."""


def tensors(file: Path) -> dict[str, StoredTensor]:
    """A full-size state dict without values."""
    checkpoint = open_yaml(file)
    original = described(read_yaml(file))
    with torch.device("meta"):
        modules = {
            name: checkpoint.layout.parts[name].module(component.class_name, component.config)
            for name, component in checkpoint.components.items()
            if component.class_name != "LDMBertModel"
        }
        text = next((c for c in checkpoint.components.values() if c.class_name == "LDMBertModel"), None)
        bert: Any = None if text is None else LDMBertModel(LDMBertConfig(**text.config))  # type: ignore[no-untyped-call]
    unet, autoencoder = modules.pop("unet"), modules.pop("autoencoder")
    heads = None if original.unet.context_width is not None else original.heads.of
    condition = {name: tensor for module in modules.values() for name, tensor in module.state_dict().items()}
    if bert is not None:
        condition = {f"transformer.{name}": tensor for name, tensor in bert_state(bert).items()}
    levels = len(original.autoencoder.widths)
    state = joined(unet_state(unet, original.unet.res_blocks, heads), autoencoder_state(autoencoder, levels), condition)
    return {
        name: StoredTensor("", name, file, tuple(tensor.shape), "float32", lambda: torch.empty(0))
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_names_and_shapes_tell_what_the_yaml_says(file: Path) -> None:
    stored, said = tensors(file), described(read_yaml(file))
    found = recognise(stored)
    assert found.name and found == replace(said, scale_factor=found.scale_factor)
    assert found.scale_factor == said.scale_factor or file.stem == "lsun_churches256"  # a tensor of its own
    prefix = "model.diffusion_model."
    values = sum(torch.Size(one.shape).numel() for name, one in stored.items() if name.startswith(prefix))
    assert round(values / 1e6) == MILLIONS[file.stem]


def test_every_row_has_a_config() -> None:
    assert {file.stem for file in CONFIGS} == set(MILLIONS)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_models_with_random_weights_are_described(file: Path) -> None:
    checkpoint = open_model(file, random_weights=True)
    model = family_named(checkpoint.family).describe(checkpoint)
    assert checkpoint.random_seed == 0 and model.family == checkpoint.family


def test_a_yaml_without_random_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a yaml has no weights; give the checkpoint, or --random-weights"):
        open_model(CONFIGS[0])
    text = CONFIGS[0].read_text().replace("model_channels", "channels_of_the_model")
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"model.yaml: has no model_channels, which the sizes"):
        open_model(tmp_path / "model.yaml", random_weights=True)
