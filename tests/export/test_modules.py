"""Loaded modules compute what diffusers' own do, bit for bit; every disagreement of config and weights is named."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from safetensors.torch import load_file
from tiny import LEVELS, edit_json, older_name, write_tensors, write_tiny_checkpoint
from torch import nn

from ldm_export.checkpoint import modules
from ldm_export.checkpoint.folder import open_checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.weights import StoredTensor
from ldm_runtime.errors import CheckpointError, SpecError

FILES = {"bert": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}
FILES["vqvae"] = FILES["unet"]
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def run(module: nn.Module, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if name == "text_encoder":
            return module.model(torch.randint(0, 50, (2, 77), generator=generator))[0]
        if name == "unet":
            context = torch.randn(2, 77, 24, generator=generator)
            return module(LATENTS, torch.tensor([1, 981]), context).sample
        if name == "autoencoder":
            image = torch.rand(2, 3, 64, 64, generator=generator)
            encoded = module.encode(image)
            return encoded.latents if isinstance(module, VQModel) else encoded.latent_dist.mode()
        return module.decode(LATENTS).sample


def theirs(folder: Path, name: str, *, vq: bool = False) -> torch.Tensor:
    place, kind = {
        "text_encoder": ("bert", LDMBertModel),
        "unet": ("unet", UNet2DConditionModel),
    }.get(name, ("vqvae", VQModel if vq else AutoencoderKL))
    return run(kind.from_pretrained(folder / place, dtype=torch.float32).eval(), name)


def ours(folder: Path, name: str) -> torch.Tensor:
    return run(load_module(open_checkpoint(folder), name), name)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def change(folder: Path, component: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of one component's file."""
    file = folder / component / FILES[component]
    state = load_file(file)
    edit(state)
    write_tensors(file, state)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "autoencoder", "decoder"])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"vq": True},
        {"format": "bin"},
        {"dtype": torch.float16},
        {"dtype": torch.bfloat16, "format": "bin"},
        {"shards": 3},
    ],
    ids=str,
)
def test_same_as_diffusers(tmp_path: Path, form: dict[str, object], name: str) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", **form)
    expected = theirs(folder, name, vq=bool(form.get("vq")))
    assert expected.std() > 1e-4
    assert torch.equal(ours(folder, name), expected)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "autoencoder", "decoder"])
@pytest.mark.parametrize("form", [{}, {"vq": True}, {"format": "bin", "shards": 2}], ids=str)
def test_older_layout(tmp_path: Path, form: dict[str, object], name: str) -> None:
    current = write_tiny_checkpoint(tmp_path / "current", vq="vq" in form)
    older = write_tiny_checkpoint(tmp_path / "older", layout="older", **form)
    assert torch.equal(ours(older, name), theirs(current, name, vq="vq" in form))


def test_older_names_are_other_names(original: Path) -> None:
    for component, least in (("unet", 50), ("vqvae", 100)):
        names = list(load_file(original / component / FILES[component]))
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
    folder = write_tiny_checkpoint(tmp_path / "older", layout="older")
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
        with pytest.raises(CheckpointError, match=r"autoencoder: .*missing: encoder"):
            load_module(checkpoint, "autoencoder")


def test_buffers_that_no_file_holds(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny")
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


@pytest.mark.parametrize(
    ("component", "name", "tensor"),
    [
        ("bert", "text_encoder", "model.layers.1.fc1.weight"),
        ("unet", "unet", "conv_in.weight"),
        ("vqvae", "decoder", "post_quant_conv.bias"),
    ],
)
def test_weights_of_another_model(tiny: Path, component: str, name: str, tensor: str) -> None:
    change(tiny, component, lambda state: state.update({"brand.new": torch.ones(2), tensor: state[tensor][:-1]}))
    with pytest.raises(CheckpointError) as caught:
        load_module(open_checkpoint(tiny), name)
    message = str(caught.value)
    assert message.startswith(f"{name}: {tiny / component}: {FILES[component]} ")
    assert "1 tensors left over: brand.new" in message and "missing" not in message
    assert f"1 tensors of another shape or dtype: {tensor} (got float32 [" in message
    change(tiny, component, lambda state: (state.pop("brand.new"), state.pop(tensor)))
    with pytest.raises(CheckpointError, match=rf"1 tensors missing: {tensor}; use the config and the weights of one"):
        load_module(open_checkpoint(tiny), name)


def test_many_missing_tensors_are_counted(tiny: Path) -> None:
    edit_json(tiny / "unet" / "config.json", layers_per_block=2)
    with pytest.raises(CheckpointError, match=r"unet: .*tensors missing: \S+, \S+, \S+, … \(\d+ in all\)") as caught:
        load_module(open_checkpoint(tiny), "unet")
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes(tiny: Path, dtype: torch.dtype) -> None:
    change(tiny, "unet", lambda state: state.update({"conv_in.bias": torch.ones(16).to(dtype)}))
    with pytest.raises(
        CheckpointError, match=r"shape or dtype: conv_in.bias \(got \w+ \[16\], expected float \[16\]\)"
    ):
        load_module(open_checkpoint(tiny), "unet")


def test_not_finite(tiny: Path) -> None:
    change(tiny, "unet", lambda state: state["conv_out.weight"][0, 0, 0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"unet: .*safetensors: tensor conv_out.weight holds NaN"):
        load_module(open_checkpoint(tiny), "unet")


def test_codebook_is_needed(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", vq=True)
    change(folder, "vqvae", lambda state: state.pop("quantize.embedding.weight"))
    with pytest.raises(CheckpointError, match=r"decoder: .*missing: quantize.embedding.weight"):
        load_module(open_checkpoint(folder), "decoder")


def test_empty_weights(tiny: Path) -> None:
    change(tiny, "unet", lambda state: state.clear())
    with pytest.raises(CheckpointError, match=r"unet: .*its weights and config.json describe different models"):
        load_module(open_checkpoint(tiny), "unet")


def test_unknown_module(tiny: Path) -> None:
    with pytest.raises(SpecError, match=r"module 'vae' is none of text_encoder, unet, autoencoder, decoder"):
        load_module(open_checkpoint(tiny), "vae")


@pytest.mark.parametrize("random_weights", [True, False])
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"block_out_channels": [2**17, 2**17]}, r"describes \d+ GiB of float32 weights, expected at most 64"),
        ({"block_out_channels": [2**24, 2**24]}, r"describes (no UNet2DConditionModel|\d+ GiB)"),
        ({"block_out_channels": [17, 34]}, "describes no UNet2DConditionModel: .*divisible"),
        ({"block_out_channels": [16, 32, 32]}, "describes no UNet2DConditionModel: Must provide the same number"),
        ({"up_block_types": ["UpBlock2D", "Imagined"]}, "describes no UNet2DConditionModel: Imagined does not exist"),
        ({"act_fn": "imagined"}, "describes no UNet2DConditionModel: .*imagined"),
    ],
)
def test_configs_of_no_module(tiny: Path, changes: dict[str, object], what: str, random_weights: bool) -> None:
    edit_json(tiny / "unet" / "config.json", **changes)
    checkpoint = open_checkpoint(tiny, random_weights=random_weights)
    with pytest.raises(CheckpointError, match=rf"unet: .*config.json {what}.*correct the config"):
        load_module(checkpoint, "unet")


def test_nothing_is_allocated_for_a_module_too_large(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "MAX_BYTES", 1000)
    monkeypatch.setattr(modules, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match="expected at most 0"):
        load_module(open_checkpoint(tiny), "unet")


@pytest.mark.parametrize("form", [{}, {"format": "bin"}, {"dtype": torch.float16}], ids=str)
def test_one_copy_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: dict[str, object]) -> None:
    folder = write_tiny_checkpoint(tmp_path / "tiny", **form)
    wide = {"encoder_ffn_dim": 4096, "d_model": 1024, "vocab_size": 4096}
    edit_json(folder / "bert" / "config.json", **wide)
    edit_json(folder / "unet" / "config.json", cross_attention_dim=1024)
    drawn = load_module(open_checkpoint(folder, random_weights=True), "text_encoder")
    state = {name: tensor.to(form.get("dtype", torch.float32)) for name, tensor in drawn.state_dict().items()}
    size = sum(4 * tensor.numel() for tensor in state.values())
    for file in (folder / "bert").glob("*model.*"):
        write_tensors(file, state)
    del state, drawn
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
