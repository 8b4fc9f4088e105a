"""Loaded modules compute what diffusers' own do, bit for bit, in one copy of the weights."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.families import open_checkpoint
from ldm_runtime.errors import CheckpointError
from tests.support.checkpoints import LEVELS, edit_json, older_name, random_checkpoint, write_tensors
from tests.support.reference_modules import FILES, change, ours, run, theirs

NAMES = ("text_encoder", "unet", "autoencoder", "decoder")


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"vq": True},
        {"format": "bin"},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "format": "bin"},
        {"dtype": torch.float64},
        {"dtype": torch.float8_e5m2},
        {"shards": 3},
    ],
    ids=str,
)
def test_same_as_diffusers(tmp_path: Path, form: dict[str, object]) -> None:
    folder = random_checkpoint(tmp_path / "tiny", **form)
    for name in NAMES:
        expected = theirs(folder, name, vq=bool(form.get("vq")))
        assert expected.std() > 1e-4, name
        assert torch.equal(ours(folder, name), expected), name


@pytest.mark.parametrize("form", [{}, {"vq": True}, {"format": "bin", "shards": 2}], ids=str)
def test_older_layout(tmp_path: Path, form: dict[str, object]) -> None:
    current = random_checkpoint(tmp_path / "current", vq="vq" in form)
    older = random_checkpoint(tmp_path / "older", layout="older", **form)
    for name in NAMES:
        assert torch.equal(ours(older, name), theirs(current, name, vq="vq" in form)), name


def test_older_names_are_other_names(tiny_checkpoint: Path) -> None:
    for component, least in (("unet", 50), ("vqvae", 100)):
        names = list(load_file(tiny_checkpoint / component / FILES[component]))
        older = [older_name(component, name) for name in names]
        assert len(set(older)) == len(names) and len(set(older) - set(names)) > least
    assert f"decoder.up.{LEVELS - 1}.block.0.conv1.weight" in older


def test_deprecated_attention_names(tiny: Path) -> None:
    expected = ours(tiny, "decoder")

    def rename(state: dict[str, torch.Tensor]) -> None:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [name for name in state if f".attentions.0.{new}." in name]:
                state[name.replace(new, old)] = state.pop(name)

    change(tiny, "vqvae", rename)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in load_file(tiny / "vqvae" / FILES["vqvae"])
    assert torch.equal(ours(tiny, "decoder"), expected)
    assert torch.equal(theirs(tiny, "decoder"), expected)


def test_attention_as_convolution(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "older", layout="older")
    expected = ours(folder, "autoencoder")

    def unsqueeze(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if ".attn_1." in name and state[name].ndim == 2]:
            state[name] = state[name][:, :, None, None]

    change(folder, "vqvae", unsqueeze)
    assert load_file(folder / "vqvae" / FILES["vqvae"])["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert torch.equal(ours(folder, "autoencoder"), expected)


def test_copies_under_older_names(tiny: Path) -> None:
    expected = ours(tiny, "unet")
    name = "down_blocks.0.downsamplers.0.conv.weight"
    change(tiny, "unet", lambda state: state.update({name.replace("conv", "op"): state[name] + 1}))
    assert torch.equal(ours(tiny, "unet"), expected)


def test_text_encoder_saved_without_its_head(tiny: Path) -> None:
    expected = ours(tiny, "text_encoder")

    def strip(state: dict[str, torch.Tensor]) -> None:
        for name in list(state):
            tensor = state.pop(name)
            if name.startswith("model."):
                state[name.removeprefix("model.")] = tensor

    change(tiny, "bert", strip)
    assert torch.equal(ours(tiny, "text_encoder"), expected)
    assert torch.equal(theirs(tiny, "text_encoder"), expected)


def test_unused_tensors_are_left_out_with_a_warning(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")
    expected = {name: ours(tiny, name) for name in ("text_encoder", "decoder")}
    assert not caplog.records
    change(tiny, "vqvae", lambda state: state.update({"loss.logvar": torch.zeros(()), "loss.0.weight": torch.ones(3)}))
    change(tiny, "bert", lambda state: state.update({"cls.bias": torch.zeros(5)}))
    for name, output in expected.items():
        assert torch.equal(ours(tiny, name), output)
        assert torch.equal(theirs(tiny, name), output)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("ldm_export")]
    assert [line.partition(": left out ")[2] for line in warnings] == [
        "a tensor that is not used: cls.bias",
        "2 tensors that the model does not use: loss.0.weight, loss.logvar",
    ]


def test_ready_to_trace(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    for name in ("text_encoder", "unet", "autoencoder", "decoder"):
        module = load_module(checkpoint, name)
        assert not any(child.training for child in module.modules())
        for tensor in (*module.parameters(), *module.buffers()):
            assert (tensor.dtype, tensor.device.type, tensor.requires_grad) == (torch.float32, "cpu", False)


def test_config_is_the_checkpoints(tiny: Path) -> None:
    edit_json(tiny / "vqvae" / "config.json", scaling_factor=0.5)
    assert load_module(open_checkpoint(tiny), "decoder").config.scaling_factor == 0.5


@pytest.mark.parametrize("present", [True, False])
def test_parts_nobody_uses(tiny: Path, present: bool) -> None:
    expected = {name: ours(tiny, name) for name in ("text_encoder", "decoder")}

    def edit_bert(state: dict[str, torch.Tensor]) -> None:
        state["model.embed_positions.position_ids"] = torch.arange(77)
        if not present:
            del state["to_logits.weight"], state["to_logits.bias"]

    def edit_vqvae(state: dict[str, torch.Tensor]) -> None:
        for name in [] if present else [name for name in state if name.startswith(("encoder.", "quant_conv."))]:
            del state[name]

    change(tiny, "bert", edit_bert)
    change(tiny, "vqvae", edit_vqvae)
    checkpoint = open_checkpoint(tiny)
    for name, output in expected.items():
        module = load_module(checkpoint, name)
        assert torch.equal(run(module, name), output)
        assert not any(key.startswith(("to_logits", "encoder", "quant_conv")) for key in module.state_dict())
    if present:
        load_module(checkpoint, "autoencoder")
    else:
        with pytest.raises(CheckpointError, match=r"autoencoder: .*missing, e\.g\. encoder"):
            load_module(checkpoint, "autoencoder")


def test_buffers_that_no_file_holds(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny")
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {
        "down_block_types": ["KDownBlock2D", "KCrossAttnDownBlock2D"],
        "up_block_types": ["KCrossAttnUpBlock2D", "KUpBlock2D"],
        "attention_head_dim": 8,
        "act_fn": "gelu",
    }
    expected = UNet2DConditionModel.from_config(config)
    expected.save_pretrained(folder / "unet")
    module = load_module(open_checkpoint(folder), "unet")
    buffers = dict(expected.named_buffers())
    assert buffers and not buffers.keys() & module.state_dict().keys()
    for name, buffer in buffers.items():
        assert torch.equal(module.get_buffer(name), buffer)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "decoder"])
def test_random_weights(tiny: Path, name: str) -> None:
    for component, file in FILES.items():
        (tiny / component / file).unlink()
    state = torch.random.get_rng_state()
    first, again, other = (
        run(load_module(open_checkpoint(tiny, random_weights=True, seed=seed), name), name) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.float32 and first.isfinite().all() and first.std() > 1e-4
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("form", [{}, {"format": "bin"}, {"dtype": torch.float16}], ids=str)
def test_one_copy_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, object]) -> None:
    folder = random_checkpoint(tmp_path / "tiny", **form)
    wide = {"encoder_ffn_dim": 4096, "d_model": 1024, "vocab_size": 4096}
    edit_json(folder / "bert" / "config.json", **wide)
    edit_json(folder / "unet" / "config.json", cross_attention_dim=1024)
    random_module = load_module(open_checkpoint(folder, random_weights=True), "text_encoder")
    state = {name: tensor.to(form.get("dtype", torch.float32)) for name, tensor in random_module.state_dict().items()}
    size = sum(4 * tensor.numel() for tensor in state.values())
    for file in (folder / "bert").glob("*model.*"):
        write_tensors(file, state)
    del state, random_module
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system, or the next tensors would not be seen
    before, peak, read = anonymous_memory(), 0, StoredTensor.read

    def measured(stored: StoredTensor) -> torch.Tensor:
        nonlocal peak
        tensor = read(stored)
        peak = max(peak, anonymous_memory())
        return tensor

    monkeypatch.setattr(StoredTensor, "read", measured)
    module = load_module(open_checkpoint(folder), "text_encoder")
    peak = max(peak, anonymous_memory())
    assert size > 75e6 and sum(parameter.nbytes for parameter in module.parameters()) == size
    assert 0.8 * size < peak - before < 1.15 * size


def anonymous_memory() -> int:
    """Bytes of this process in memory that are no pages of a mapped file."""
    return next(
        1024 * int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line
    )
