"""Modules that are not loaded: every disagreement of config and weights is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm_export.checkpoint import modules
from ldm_export.checkpoint.modules import load_module
from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.families import open_checkpoint
from ldm_runtime.errors import CheckpointError, SpecError
from tests.support.checkpoints import edit_json, random_checkpoint
from tests.support.reference_modules import FILES, change


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
    assert message.startswith(f"{name}: /") and f"{component}: {FILES[component]} and config.json describe" in message
    assert "; 1 unused, e.g. brand.new; use" in message and "missing" not in message
    assert f"1 tensors of another shape or dtype, e.g. {tensor} (got float32 [" in message
    change(tiny, component, lambda state: (state.pop("brand.new"), state.pop(tensor)))
    with pytest.raises(CheckpointError, match=rf"1 tensors missing, e.g. {tensor}; use the config"):
        load_module(open_checkpoint(tiny), name)


def test_many_missing_tensors_are_counted(tiny: Path) -> None:
    edit_json(tiny / "unet" / "config.json", layers_per_block=2)
    with pytest.raises(CheckpointError, match=r"unet: .*\d\d tensors missing, e\.g\. down_blocks\.\S+; "):
        load_module(open_checkpoint(tiny), "unet")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_other_dtypes(tiny: Path, dtype: torch.dtype) -> None:
    change(tiny, "unet", lambda state: state.update({"conv_in.bias": torch.ones(16).to(dtype)}))
    with pytest.raises(
        CheckpointError, match=r"shape or dtype, e.g. conv_in.bias \(got \w+ \[16\], expected float \[16\]\)"
    ):
        load_module(open_checkpoint(tiny), "unet")


def test_float8_with_scales(tiny: Path) -> None:
    """diffusers leaves the scales out and generates noise."""

    def quantize(state: dict[str, torch.Tensor]) -> None:
        state["conv_in.weight"] = state["conv_in.weight"].to(torch.float8_e4m3fn)
        state["conv_in.weight_scale"] = torch.tensor(0.5)

    change(tiny, "unet", quantize)
    with pytest.raises(CheckpointError, match=r"1 tensors of scales, which float8 .*, e.g. conv_in.weight_scale"):
        load_module(open_checkpoint(tiny), "unet")


def test_not_finite(tiny: Path) -> None:
    change(tiny, "unet", lambda state: state["conv_out.weight"][0, 0, 0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"unet: .*safetensors: tensor conv_out.weight holds NaN"):
        load_module(open_checkpoint(tiny), "unet")


def test_codebook_is_needed(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "tiny", vq=True)
    change(folder, "vqvae", lambda state: state.pop("quantize.embedding.weight"))
    with pytest.raises(CheckpointError, match=r"decoder: .*missing, e.g. quantize.embedding.weight"):
        load_module(open_checkpoint(folder), "decoder")


def test_empty_weights(tiny: Path) -> None:
    change(tiny, "unet", lambda state: state.clear())
    with pytest.raises(CheckpointError, match=r"unet: .*its weights and config.json describe different models"):
        load_module(open_checkpoint(tiny), "unet")


def test_unknown_module(tiny: Path) -> None:
    with pytest.raises(SpecError, match=r"module: got 'vae', expected one of text_encoder, unet, autoencoder, decoder"):
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
    monkeypatch.setattr(StoredTensor, "read", lambda _: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match="expected at most 0"):
        load_module(open_checkpoint(tiny), "unet")
