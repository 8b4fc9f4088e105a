"""Checkpoints under CompVis' names open as the modules they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ldm_export.checkpoint.folder import Checkpoint
from ldm_export.checkpoint.modules import load_module
from ldm_export.originals import open_original
from ldm_export.originals.published import PUBLISHED
from ldm_runtime.errors import CheckpointError
from tests.support.checkpoints import VOCABULARY
from tests.support.compvis_checkpoints import CompVis, text_to_image, unconditional
from tests.support.compvis_states import with_averages


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "words.txt").write_text("\n".join(VOCABULARY[:24]) + "\n")
    return tmp_path / "words.txt"


def opened(original: CompVis, folder: Path, tokenizer: Path | None = None, **options: Any) -> Checkpoint:
    file = original.save(folder)
    return open_original(file, config=folder / "model.yaml", tokenizer=tokenizer, **options)


def assert_modules(checkpoint: Checkpoint, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        converted = load_module(checkpoint, name).state_dict()
        for key, tensor in converted.items():
            assert torch.equal(tensor, module.state_dict()[key]), f"{name}: {key}"


@pytest.mark.parametrize(
    "form", [{}, {"updown": True}, {"scale_shift": True}, {"heads": 4}, {"updown": True, "heads": 8}]
)
def test_unconditional_models(form: dict[str, Any], tmp_path: Path) -> None:
    original = unconditional(**form)
    checkpoint = opened(original, tmp_path)
    assert checkpoint.family == "unconditional"
    assert_modules(checkpoint, original.modules)


@pytest.mark.parametrize("heads", [4, 8])
def test_a_number_of_heads_is_set_at_every_width_with_its_scale(heads: int, tmp_path: Path) -> None:
    unet: Any = load_module(opened(unconditional(heads=heads), tmp_path), "unet")
    for block, width in ((unet.down_blocks[1], 64), (unet.down_blocks[2], 96), (unet.mid_block, 96)):
        assert block.attentions[0].heads == heads
        assert block.attentions[0].scale == pytest.approx((width / heads) ** -0.5)


@pytest.mark.parametrize("depth", [1, 2])
def test_text_to_image_models(depth: int, tmp_path: Path, vocabulary: Path) -> None:
    original = text_to_image(depth)
    checkpoint = opened(original, tmp_path, vocabulary)
    assert checkpoint.family == "text_to_image"
    assert_modules(checkpoint, original.modules)
    assert checkpoint.components["autoencoder"].config["scaling_factor"] == 0.18215


def test_moving_averages_are_the_model_unless_the_yaml_or_the_caller_says_otherwise(tmp_path: Path) -> None:
    original = unconditional()
    plain = original.modules["unet"].state_dict()
    original.state = with_averages(original.state)

    def difference(**options: Any) -> float:
        converted = load_module(opened(original, tmp_path, **options), "unet").state_dict()
        return float((converted["conv_in.weight"] - plain["conv_in.weight"]).mean())

    assert difference() == pytest.approx(1)
    assert difference(weights="model") == 0
    original.params["use_ema"] = False
    assert difference() == 0
    assert difference(weights="ema") == pytest.approx(1)


def test_the_buffer_scale_factor_has_precedence(tmp_path: Path) -> None:
    original = unconditional()
    original.params["scale_by_std"] = True
    with pytest.raises(CheckpointError, match="no tensor scale_factor"):
        opened(original, tmp_path)
    original.state["scale_factor"] = torch.tensor(0.25)
    assert opened(original, tmp_path).components["autoencoder"].config["scaling_factor"] == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_schedule_comes_from_the_betas(dtype: torch.dtype, tmp_path: Path) -> None:
    original = unconditional()
    original.state["betas"] = original.state["betas"].to(dtype)
    del original.params["linear_start"], original.params["linear_end"]
    with pytest.raises(CheckpointError, match=r"betas.*0.0001 to 0.02"):
        opened(original, tmp_path)  # the yaml's defaults are another schedule's
    original.params |= {"linear_start": 0.0015, "linear_end": 0.0195}
    options = opened(original, tmp_path).scheduler_config
    assert (options["beta_start"], options["beta_end"]) == (0.0015, 0.0195)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"unet_config": {"params": {"model_channels": 64, "num_heads": 1}}},
            "model_channels is 64, but 32 by .*32, 3, 3",
        ),
        ({"unet_config": {"params": {"num_heads": 1, "context_dim": 5}}}, "context_dim is 5, but None by"),
        ({"unet_config": {"params": {"model_channels": "x"}}}, "expected a number"),
        ({"unet_config": {"params": {"model_channels": 32}}}, "no num_heads or num_head_channels"),
        ({"unet_config": {"params": {"num_heads": 5}}}, "expected a divisor"),
        ({"first_stage_config": {"params": {"n_embed": 17}}}, r"n_embed is 17, but 16 by .*\[16, 3\]"),
        ({"linear_end": 0.012}, "betas"),
        ({"unet_config": None}, "expected a latent diffusion model's yaml"),
    ],
)
def test_a_yaml_of_another_model_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    original = unconditional()
    original.params |= change
    with pytest.raises(CheckpointError, match=message):
        opened(original, tmp_path)


@pytest.mark.parametrize(
    "text", ["a: [", "a: &x [1]\nb: *x", "!!python/object/apply:os.system ['true']", "[" * 5000, "\x00"]
)
def test_damaged_and_unsafe_yaml_is_refused(text: str, tmp_path: Path) -> None:
    file = unconditional().save(tmp_path)
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="not valid YAML"):
        open_original(file, config=tmp_path / "model.yaml")


def test_unknown_sizes_need_a_yaml(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"how many attention heads it has.*--config"):
        open_original(unconditional().save(tmp_path))


def test_texts_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--tokenizer"):
        opened(text_to_image(), tmp_path)


def test_foreign_state_dicts_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"input_blocks.0.0.weight is missing"):
        open_original(tmp_path / "model.ckpt")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    original = unconditional()
    del original.state["model.diffusion_model.time_embed.2.bias"]
    with pytest.raises(CheckpointError, match=r"time_embedding.linear_2.bias"):
        load_module(opened(original, tmp_path), "unet")


def test_every_published_model_is_told_by_its_sizes() -> None:
    keys = [(row.kind, row.width, row.multiples, row.attention, row.context, row.prediction_type) for row in PUBLISHED]
    assert len(set(keys)) == len(keys)
    for row in PUBLISHED:
        assert all(row.heads.divides(row.width * multiple) for multiple in row.multiples)
