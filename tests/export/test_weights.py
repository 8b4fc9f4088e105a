"""Reading weight files: every form, one tensor at a time; nothing damaged, unsafe or not finite passes."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from ldm_export.checkpoint.weights import read_weights
from ldm_runtime.errors import CheckpointError
from tests.support.checkpoints import write_tensors, write_weights
from tests.support.weight_files import STATE, assert_read, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("transformers", [True, False])
def test_every_form_reads_the_same(
    tmp_path: Path, format: str, shards: int, dtype: torch.dtype, transformers: bool
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    write_weights(tmp_path, state, transformers=transformers, format=format, shards=shards)
    stored = read_weights(tmp_path, "unet")["conv.weight"]
    assert (stored.shape, stored.dtype) == ((2, 3, 2, 2), str(dtype).removeprefix("torch."))
    assert_read(tmp_path, state)


@pytest.mark.parametrize(
    "file",
    [
        "diffusion_pytorch_model.fp16.safetensors",
        "model.bf16.safetensors",
        "pytorch_model.fp16.bin",
        "diffusion_model.pt",
    ],
)
def test_other_file_names(tmp_path: Path, file: str) -> None:
    write_tensors(tmp_path / file, STATE)
    assert_read(tmp_path, STATE)


def test_variant_shards(tmp_path: Path) -> None:
    write_weights(tmp_path, STATE, format="safetensors", shards=2)
    plain = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    plain.rename(tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json")
    assert_read(tmp_path, STATE)


def test_full_precision_first_then_safetensors(tmp_path: Path) -> None:
    order = ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "pytorch_model.fp16.bin"]
    for number, file in enumerate(order):
        write_tensors(tmp_path / file, {"x": torch.tensor([float(number)])})
    for number, file in enumerate(order):
        assert values(tmp_path)["x"].item() == number
        (tmp_path / file).unlink()


def test_bin_from_before_zip_files(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_read(tmp_path, STATE)


def test_values_are_copies(tmp_path: Path) -> None:
    for format in ("safetensors", "bin"):
        write_weights(tmp_path, STATE, format=format)
        stored = read_weights(tmp_path, "unet")["conv.bias"]
        stored.read().zero_()
        assert torch.equal(stored.read(), STATE["conv.bias"])
        (tmp_path / f"diffusion_pytorch_model.{format}").unlink()


def test_strided_bin_tensors_become_contiguous(tmp_path: Path) -> None:
    torch.save({"x": STATE["conv.weight"].permute(1, 0, 2, 3)}, tmp_path / "pytorch_model.bin")
    assert_read(tmp_path, {"x": STATE["conv.weight"].permute(1, 0, 2, 3).contiguous()})


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"unet: no weights in .*download the checkpoint whole"):
        read_weights(tmp_path, "unet")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.98])
def test_truncated(tmp_path: Path, file: str, keep: float) -> None:
    write_tensors(tmp_path / file, {"x": torch.ones(512), "y": torch.ones(8)})
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=rf"unet: .*{file}: damaged or truncated .*download"):
        read_weights(tmp_path, "unet")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_other_content(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"<html>not found</html>" * 50)
    with pytest.raises(CheckpointError, match=rf"{file}: damaged or truncated"):
        read_weights(tmp_path, "unet")


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"is a Git LFS pointer.*git lfs pull"):
        read_weights(tmp_path, "unet")


def test_vanished_between_listing_and_reading(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", STATE)
    stored = read_weights(tmp_path, "unet")["conv.bias"]
    (tmp_path / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(CheckpointError, match=r"tensor conv.bias cannot be read"):
        stored.read()


class Touch:
    """Pickles to a call that creates a file: what a malicious ``.bin`` does."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.file), os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_bin_is_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "trap"
    pickle.loads(pickle.dumps(Touch(trap)))  # it does what it says where pickles are trusted
    assert trap.exists()
    trap.unlink()
    state = STATE | {"evil": Touch(trap)}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"unet: .*pytorch_model.bin holds objects other than tensors"):
        read_weights(tmp_path, "unet")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"state_dict": STATE}, "'state_dict' is a dict"),
        ({"step": 3}, "'step' is a int"),
        ({5: torch.ones(2)}, "5 is a Tensor"),
        ({"x": torch.eye(3).to_sparse()}, "'x' is a Tensor torch.sparse_coo"),
    ],
)
def test_bin_of_something_else(tmp_path: Path, content: object, what: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"{what}.*expected a dict from names to"):
        read_weights(tmp_path, "unet")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_not_finite(tmp_path: Path, file: str, dtype: torch.dtype, value: float) -> None:
    weight = torch.zeros(3, 5, dtype=dtype)
    weight[1, 2] = value
    write_tensors(tmp_path / file, {"fine": torch.zeros(2), "bad": weight})
    stored = read_weights(tmp_path, "unet")
    assert torch.equal(stored["fine"].read(), torch.zeros(2))
    with pytest.raises(CheckpointError, match=rf"{file}: tensor bad holds NaN or infinite"):
        stored["bad"].read()


def test_other_dtypes_are_reported(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"ids": torch.arange(4), "flags": torch.ones(2, dtype=torch.bool)})
    assert {name: stored.dtype for name, stored in read_weights(tmp_path, "unet").items()} == {
        "ids": "I64",
        "flags": "BOOL",
    }
    (tmp_path / "model.safetensors").unlink()
    write_tensors(tmp_path / "pytorch_model.bin", {"ids": torch.arange(4)})
    assert read_weights(tmp_path, "unet")["ids"].dtype == "int64"


def test_an_archive_that_inflates_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(CheckpointError, match=r"bytes that inflate to 10000002, expected entries that are not compres"):
        read_weights(tmp_path, "unet")


def test_a_tensor_that_repeats_its_values_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**12)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"'x' has shape \[1000000000000\], but only 4 bytes are stored for it"):
        read_weights(tmp_path, "unet")


def test_an_archive_over_several_disks_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    locator = content.rindex(b"PK\x06\x07")  # of the end of the directory, whose last field is the number of disks
    content[locator + 16] = 2
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged or truncated \(zipfiles that span multiple disks"):
        read_weights(tmp_path, "unet")
