"""Checkpoint files list and give the tensors that torch.load gives, and refuse what torch.save does not write."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm_export.originals.checkpoint_file import read_state_dict
from ldm_runtime.errors import CheckpointError

LEGACY = {"_use_new_zipfile_serialization": False}


def tensors() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32)
    return OrderedDict(
        a=base.reshape(4, 6),
        transposed=base.reshape(4, 6).T,
        part=base[5:11],
        column=base.reshape(4, 6)[:, 2],
        half=torch.randn(3, 2).half(),
        bfloat=torch.randn(3).bfloat16(),
        scalar=torch.tensor(1.5),
        integers=torch.arange(5),
        empty=torch.zeros(0, 3),
        parameter=nn.Parameter(torch.randn(2, 2)),
        one=torch.ones(1, 3).expand(1, 3),
    )


@pytest.mark.parametrize("options", [{}, LEGACY, {"pickle_protocol": 4}], ids=["zip", "legacy", "protocol 4"])
def test_tensors_are_those_of_torch(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    state = tensors()
    torch.save({"state_dict": state, "optimizer_states": [{"state": {0: torch.ones(3)}}], "epoch": 1}, file, **options)
    stored = read_state_dict(file)
    assert list(stored) == list(state)
    for name, tensor in state.items():
        assert stored[name].shape == tuple(tensor.shape)
        assert stored[name].dtype == str(tensor.dtype).removeprefix("torch.")
        assert torch.equal(stored[name].load(), tensor.detach())
        assert torch.equal(stored[name].read(), tensor.detach().float())


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_state_dict_alone_is_read(options: dict[str, Any], tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "model.pt", **options)
    assert set(read_state_dict(tmp_path / "model.pt")) == {"weight", "bias"}


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path / "model.safetensors")["a"].read().sum() == 6


def test_the_device_does_not_matter(tmp_path: Path) -> None:
    state = torch.save({"a": torch.ones(3)}, tmp_path / "cpu.ckpt", **LEGACY) or (tmp_path / "cpu.ckpt").read_bytes()
    (tmp_path / "gpu.ckpt").write_bytes(state.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:3"))
    assert read_state_dict(tmp_path / "gpu.ckpt")["a"].read().tolist() == [1, 1, 1]


class Caller:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_calls_in_a_file_are_not_made(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(2), "b": Caller()}, "callbacks": {1: Caller()}}, "model.ckpt", **options)
    assert list(read_state_dict(Path("model.ckpt"))) == ["a"]
    assert not Path("executed").exists()


def archive(folder: Path, record: Any, storages: dict[str, bytes], compress: bool = False) -> Path:
    """A zip file as torch.save writes it, with a pickle of one's own."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, str) and value.startswith("storage "):
                _, key, numel = value.split()
                return ("storage", torch.FloatStorage, key, "cpu", int(numel))
            return None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(record)
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(folder / "model.ckpt", "w", kind) as opened:
        opened.writestr("archive/data.pkl", buffer.getvalue())
        for key, content in storages.items():
            opened.writestr(f"archive/data/{key}", content)
    return folder / "model.ckpt"


class Tensor:
    def __init__(self, storage: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]):
        self.arguments = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor("storage 0 4", 0, (2**40,), (0,)),
        Tensor("storage 0 4", 0, (2, 3), (1, 1)),
        Tensor("storage 0 4", 3, (2,), (1,)),
        Tensor("storage 0 4", 0, (5,), (1,)),
        Tensor("storage 1 4", 0, (1,), (1,)),
        Tensor("storage 0 4", 0, (2**62, 2**62), (2**62, 1)),
    ],
    ids=["stride 0", "overlap", "offset", "length", "no storage", "overflow"],
)
def test_tensors_outside_of_their_storage_are_refused(tensor: Tensor, tmp_path: Path) -> None:
    file = archive(tmp_path, {"a": tensor}, {"0": struct.pack("<4f", 1, 2, 3, 4)})
    with pytest.raises(CheckpointError, match=r"tensor a has shape .* expected a tensor inside of its storage"):
        read_state_dict(file)


def test_negative_sizes_are_no_tensors(tmp_path: Path) -> None:
    file = archive(tmp_path, {"a": Tensor("storage 0 4", -1, (1,), (1,))}, {"0": bytes(16)})
    with pytest.raises(CheckpointError, match="no tensors in its state_dict"):
        read_state_dict(file)


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    file = archive(tmp_path, {"a": Tensor("storage 0 4", 0, (1,), (1,))}, {"0": bytes(2**24)}, compress=True)
    with pytest.raises(CheckpointError, match=r"is compressed, expected an archive as torch.save writes it"):
        read_state_dict(file)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    file = archive(tmp_path, {"a": Tensor("storage 0 4", 0, (1,), (1,))}, {str(i): bytes(4000) for i in range(40)})
    data = file.read_bytes()
    directory = data.index(b"PK\x01\x02")
    entries, first = data[directory:].split(b"PK\x01\x02")[1:], 0
    offset = struct.unpack("<I", entries[1][38:42])[0]
    end = entries[-1].index(b"PK\x05\x06")
    tail, entries[-1] = entries[-1][end:], entries[-1][:end]
    shared = [entries[0]] + [entry[:38] + struct.pack("<I", offset) + entry[42:] for entry in entries[1:]]
    start = offset + 4100 + first
    tail = tail[:16] + struct.pack("<I", start) + tail[20:]
    file.write_bytes(data[:start] + b"".join(b"PK\x01\x02" + entry for entry in shared) + tail)
    with pytest.raises(CheckpointError, match=r"its entries have .* bytes, the file|damaged"):
        read_state_dict(file)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("length", [0, 3, 100, 0.3, 0.6, 0.9, 0.99])
def test_truncated_files_are_refused(options: dict[str, Any], length: float, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": tensors()}, file, **options)
    data = file.read_bytes()
    file.write_bytes(data[: int(length if length > 1 else length * len(data))])
    with pytest.raises(CheckpointError) as error:
        read_state_dict(file)
    assert "\n" not in str(error.value) and "model.ckpt" in str(error.value)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_random_damage_ends_in_one_error(options: dict[str, Any], tmp_path: Path) -> None:
    import random

    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(3), "b": torch.ones(2, 2)}}, file, **options)
    source, generator = file.read_bytes(), random.Random(0)
    for _ in range(300):
        data = bytearray(source)
        for _ in range(3):
            data[generator.randrange(len(data))] = generator.randrange(256)
        file.write_bytes(data)
        try:
            for stored in read_state_dict(file).values():
                stored.load()
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"\x93NUMPY", "expected a torch.save or safetensors file"),
        (pickle.dumps({"a": 1}, 2), "damaged|not one of torch.save|not a pickle"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "model.ckpt")


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_state_dict(tmp_path / "model.ckpt")
