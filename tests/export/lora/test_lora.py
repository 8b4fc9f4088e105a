"""LoRA files merged at build: the images of diffusers' pipeline whose layers have the low-rank branches beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from ldm_export.checkpoint.modules import load_module
from ldm_export.families import open_checkpoint
from ldm_export.lora import parse_lora, with_loras
from ldm_runtime.errors import CheckpointError
from tests.support.lora_files import ALPHA, RANK, UNET, XL_PREFIXES, branches, factors_of, kohya, older_diffusers, peft
from tests.support.shared import SharedFolders
from tests.support.stable_diffusion import stable_diffusion_checkpoint
from tests.support.torch_pipeline import torch_pipeline

SCALE = 0.8
TEXT = "encoder.layers.0.self_attn.q_proj"
Refused = Callable[..., None]


@pytest.fixture
def xl(xl_checkpoint: Path) -> Path:
    """A small checkpoint of Stable Diffusion XL; read-only."""
    return xl_checkpoint


@pytest.fixture(scope="module")
def sd1(shared: SharedFolders) -> Path:
    """A small checkpoint of Stable Diffusion 1; read-only."""
    return shared.once("sd1", lambda folder: stable_diffusion_checkpoint(folder, 1))


@pytest.mark.parametrize("form", ["peft", "peft with alpha", "older diffusers", "kohya", "kohya, authors' names"])
def test_images_of_xl_equal_diffusers(xl: Path, tmp_path: Path, form: str) -> None:
    pipeline = DiffusionPipeline.from_pretrained(xl)
    pipeline.set_progress_bar_config(disable=True)
    modules = {"unet": [*UNET], "text_encoder": [TEXT], "text_encoder_2": [f"text_model.{TEXT}"]}
    factors = factors_of(pipeline, modules)
    state, metadata = peft(factors), None
    if form == "peft with alpha":
        metadata = {"lora_adapter_metadata": json.dumps({f"{part}.lora_alpha": ALPHA for part in modules})}
    elif form == "older diffusers":
        state = older_diffusers(factors)
    elif form.startswith("kohya"):
        state = kohya(factors, "authors" in form, XL_PREFIXES)
    alpha = float(RANK) if form in ("peft", "older diffusers") else ALPHA
    file = tmp_path / "style.safetensors"
    save_file(state, file, metadata)
    request: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16}
    with torch.random.fork_rng(devices=[]):
        (plain,) = pipeline(["a red circle"], generator=torch.manual_seed(0), **request).images
        with branches(pipeline, factors, SCALE * alpha / RANK):
            (theirs,) = pipeline(["a red circle"], generator=torch.manual_seed(0), **request).images
    checkpoint = with_loras(open_checkpoint(xl), [parse_lora(f"{file}:{SCALE}")])
    with torch_pipeline(checkpoint, tmp_path / "files") as pipe:
        (ours,) = pipe(["a red circle"], seed=0, **request).images
    arrays = [np.asarray(image, np.int64) for image in (ours, theirs, plain)]
    assert np.abs(arrays[0] - arrays[1]).max() <= 1 < np.abs(arrays[1] - arrays[2]).max()


def test_two_files_add_up(sd1: Path, tmp_path: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
    factors = factors_of(pipeline, {"unet": [name], "text_encoder": [TEXT]})
    for file, state in (
        ("a", peft(factors)),
        ("b", kohya(factors, False, {**XL_PREFIXES, "text_encoder": "lora_te_"})),
    ):
        save_file(state, tmp_path / f"{file}.safetensors")
    texts = [f"{tmp_path / 'a.safetensors'}:-0.5", f"{tmp_path / 'b.safetensors'}"]
    checkpoint = with_loras(open_checkpoint(sd1), [parse_lora(text) for text in texts])
    assert [(one["file"], one["scale"]) for one in checkpoint.loras] == [
        ("a.safetensors", -0.5),
        ("b.safetensors", 1.0),
    ]
    changed = load_module(checkpoint, "unet").get_parameter(f"{name}.weight")
    down, up = (tensor.float() for tensor in factors["unet", name])
    expected = pipeline.unet.get_parameter(f"{name}.weight") + (ALPHA / RANK - 0.5) * (up @ down)
    assert torch.allclose(changed, expected, atol=1e-6)
    keys = [one.depends for one in checkpoint.components.values()]
    assert ["loras" in key for key in keys] == [True, True, False]


def test_refusals(sd1: Path, xl: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(sd1, tmp_path / "checkpoint")
    q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{q}.lora_A.weight": torch.ones(2, 64), f"{q}.lora_B.weight": torch.ones(64, 2)}
    wide = {f"{q}.lora_A.weight": torch.ones(2, 80), f"{q}.lora_B.weight": torch.ones(64, 2)}
    second = {name.replace("unet.", "text_encoder_2."): tensor for name, tensor in pair.items()}
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "wide": (wide, r"factors [2, 80] and [64, 2] for weights [64, 64]; of 1 LoRA layers all must fit"),
        "missing": ({name.replace("mid_block.", "mid_block.9."): one for name, one in pair.items()}, "no such layer"),
        "second": (second, "the checkpoint has no text_encoder_2; of 1 LoRA layers all must fit"),
        "half": ({f"{q}.lora_A.weight": torch.ones(2, 64)}, "got one factor of two"),
        "dora": (pair | {f"{q}.lora_magnitude_vector": torch.ones(64)}, "got DoRA, which also changes the length"),
        "loha": ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "got LoHa, products of low-rank matrices"),
        "other": ({"unet.conv_in.weight": torch.ones(2, 2)}, "key unet.conv_in.weight is of no known form of LoRA"),
        "odd": ({"x.lora_A.weight": torch.ones(1, 1), "x.lora_B.weight": torch.ones(1, 1)}, "is of no part that is"),
    }
    for name, (state, message) in cases.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        refused("build", "checkpoint", "--lora", f"{name}.safetensors", "-o", "bundle", message=message)
    refused("build", "checkpoint", "--lora", "none.safetensors:2", "-o", "bundle", message="none.safetensors: no such")
    refused("build", "checkpoint", "--lora", "wide.safetensors:1e9", "-o", "bundle", message="got scale 1e+09")
    save_file(pair, tmp_path / "dora2.safetensors", {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})
    with pytest.raises(CheckpointError, match=r"unet\.use_dora is set in its metadata"):
        with_loras(open_checkpoint(sd1), [parse_lora(str(tmp_path / "dora2.safetensors"))])
