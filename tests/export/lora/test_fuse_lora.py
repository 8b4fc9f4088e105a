"""Weights with a merged LoRA file equal those of diffusers' ``load_lora_weights`` and ``fuse_lora``, with peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from ldm_export.checkpoint.modules import load_module
from ldm_export.families import open_checkpoint
from ldm_export.lora import parse_lora, with_loras
from tests.support.lora_files import ALPHA, RANK, UNET, XL_PREFIXES, factors_of, kohya, older_diffusers, peft

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of peft

LAYERS = [f"encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")]
SCALE = 0.8


@pytest.mark.parametrize("form", ["peft", "peft with alpha", "older diffusers", "kohya", "kohya, authors' names"])
def test_weights_of_xl(xl_checkpoint: Path, tmp_path: Path, form: str) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRA files with the package peft, which is no dependency")
    pipeline = DiffusionPipeline.from_pretrained(xl_checkpoint, add_watermarker=False)
    modules = {"unet": [*UNET], "text_encoder": LAYERS, "text_encoder_2": [f"text_model.{name}" for name in LAYERS]}
    if form == "kohya":  # diffusers 0.42.1 skips this layer, with a warning
        modules["unet"].remove("add_embedding.linear_2")
    factors = factors_of(pipeline, modules)
    state, metadata = peft(factors), None
    if form == "peft with alpha":
        facts = [{"lora_alpha": ALPHA, "r": RANK, "target_modules": names} for names in modules.values()]
        named = {f"{part}.{key}": fact for part, one in zip(modules, facts, strict=True) for key, fact in one.items()}
        metadata = {"lora_adapter_metadata": json.dumps(named)}
    elif form == "older diffusers":
        state = older_diffusers(factors)
    elif form.startswith("kohya"):
        state = kohya(factors, "authors" in form, XL_PREFIXES)
    file = tmp_path / "style.safetensors"
    save_file(state, file, metadata)
    plain = {key: getattr(pipeline, key[0]).get_submodule(key[1]).weight.detach().clone() for key in factors}
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    pipeline.fuse_lora(components=[*modules], lora_scale=SCALE)
    pipeline.unload_lora_weights()
    checkpoint = with_loras(open_checkpoint(xl_checkpoint), [parse_lora(f"{file}:{SCALE}")])
    for part in modules:
        theirs = getattr(pipeline, part).state_dict()
        for name, ours in load_module(checkpoint, part).state_dict().items():
            assert torch.equal(ours, theirs[name]), f"{part}.{name}"
    assert all((getattr(pipeline, key[0]).get_submodule(key[1]).weight != one).any() for key, one in plain.items())
