"""Lists the tensors of a training checkpoint without running its pickle, and reads them one at a time.

Formats: ``torch.save`` as a zip archive (torch 1.6 and later) and as a sequence of pickles (before), and safetensors.
The state dict is the file's entry ``state_dict`` if there is one. Nothing else is read, for example optimizer states.
The devices from which tensors were saved do not matter.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ldm_export.checkpoint.weights import StoredTensor, read_safetensors
from ldm_export.originals.pickle_machine import Global, PersistentId, PickleRecord
from ldm_export.originals.pickle_reader import read_pickle
from ldm_runtime.errors import CheckpointError

__all__ = ["SUFFIXES", "is_checkpoint_file", "read_state_dict", "read_text"]

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")
MAX_PICKLE, MAX_ENTRIES, MAX_RANK = 64 * 2**20, 2**18, 8
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_STORAGES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}
_TENSOR = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"}
_PARAMETER = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_NO_FILE = "{}: no such file, expected a checkpoint file; check the path"


@dataclass(frozen=True)
class _Storage:
    """A part of a file: first byte and length in bytes."""

    start: int
    size: int


@dataclass(frozen=True)
class _View:
    """A tensor as the pickle describes it. Offset and strides are in elements."""

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Number of elements from the first to the last one, inclusive."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


def is_checkpoint_file(path: Path) -> bool:
    """True for a file with the suffix of a training checkpoint."""
    return path.suffix in SUFFIXES and not path.is_dir()


def read_state_dict(file: Path, entry: str = "state_dict") -> dict[str, StoredTensor]:
    """Return name -> tensor of the state dict in a checkpoint file. Values are read from disk on use.

    Args:
        file: The file.
        entry: Entry with the state dict, in a file that is not safetensors. If it is missing, the whole file is one.

    Raises:
        CheckpointError: The file is missing, damaged, truncated or has another format, or sizes in it do not fit the
            file.
    """
    if not file.is_file():
        raise CheckpointError(_NO_FILE.format(file))
    if file.suffix == ".safetensors":
        return read_safetensors(file, "checkpoint")
    return _tensors(file, *_content(file), entry)


def read_text(file: Path, entry: str) -> str | None:
    """Return a text entry of a checkpoint file; None if it has none or is safetensors.

    Raises:
        CheckpointError: As ``read_state_dict``.
    """
    content = None if file.suffix == ".safetensors" else _content(file)[0]
    text = content.get(entry) if isinstance(content, dict) else None
    return text if isinstance(text, str) else None


def _content(file: Path) -> tuple[Any, dict[str, _Storage]]:
    """What a file of ``torch.save`` has in its pickle, and the position of each storage."""
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
            if start.startswith(b"version https://"):
                raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run git lfs pull")
            if start.startswith(b"PK"):
                return _read_zip(file, opened)
            if start.startswith(b"\x80"):
                opened.seek(0)
                return _read_legacy(file, opened)
            raise CheckpointError(
                f"{file}: begins with {start[:4]!r}, expected a torch.save or safetensors file; download it again"
            )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, EOFError, OverflowError, zipfile.BadZipFile, struct.error) as error:
        raise CheckpointError(f"{file}: damaged or truncated ({error}); download the file again") from None


def _read_zip(file: Path, opened: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """Return the content of ``data.pkl`` and the position of each storage; entries must not be compressed."""
    size = file.stat().st_size
    with zipfile.ZipFile(opened) as archive:
        entries = archive.infolist()
        pickles = [
            entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")
        ]
        if len(pickles) != 1 or len(entries) > MAX_ENTRIES:
            raise CheckpointError(f"{file}: no archive of torch.save, expected one data.pkl; download the file again")
        packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
        total = sum(entry.file_size for entry in entries)
        if packed or total > size or pickles[0].file_size > MAX_PICKLE:
            what = f"{packed[0]!r:.60} is compressed" if packed else f"its entries have {total} bytes, the file {size}"
            raise CheckpointError(f"{file}: {what}, expected an archive as torch.save writes it; do not use this file")
        root = pickles[0].filename.removesuffix("data.pkl")
        order = next((entry for entry in entries if entry.filename == f"{root}byteorder"), None)
        if order is not None and archive.read(order)[:8] != b"little":
            raise CheckpointError(f"{file}: saved on a big-endian machine, expected little; save it again elsewhere")
        content = read_pickle(BytesIO(archive.read(pickles[0])), str(file))
    storages = {
        entry.filename.removeprefix(f"{root}data/"): _zip_storage(file, opened, entry, size)
        for entry in entries
        if entry.filename.startswith(f"{root}data/")
    }
    return content, storages


def _zip_storage(file: Path, opened: BinaryIO, entry: zipfile.ZipInfo, size: int) -> _Storage:
    opened.seek(entry.header_offset)
    header = opened.read(30)
    if len(header) != 30 or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{file}: entry {entry.filename!r:.60} is damaged; download the file again")
    name, extra = struct.unpack("<HH", header[26:30])
    start = entry.header_offset + 30 + name + extra
    if start + entry.file_size > size:
        raise CheckpointError(f"{file}: entry {entry.filename!r:.60} ends after the file; download the file again")
    return _Storage(start, entry.file_size)


def _read_legacy(file: Path, opened: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """Read a file of torch before 1.6: magic number, protocol, system, content, keys, then storages with lengths."""
    magic, protocol = (read_pickle(opened, str(file)) for _ in range(2))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
        raise CheckpointError(f"{file}: a pickle, but not one of torch.save, expected a checkpoint; download it again")
    _, content, keys = (read_pickle(opened, str(file)) for _ in range(3))
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise CheckpointError(f"{file}: damaged: the list of its storages cannot be read; download the file again")
    widths, storages, size = dict(_storage_widths(content)), dict[str, _Storage](), file.stat().st_size
    for key in keys:
        length = struct.unpack("<q", opened.read(8))[0]
        storages[key] = _Storage(opened.tell(), length * widths.get(key, 0))
        if length < 0 or key not in widths or opened.tell() + storages[key].size > size:
            raise CheckpointError(f"{file}: storage {key!r:.40} ends after the file; download the file again")
        opened.seek(storages[key].size, 1)
    return content, storages


def _storage_widths(content: Any) -> Iterator[tuple[str, int]]:
    """Return key -> bytes per element of every storage that any object of a pickle names."""
    todo, visited = [content], set[int]()
    while todo:
        value = todo.pop()
        if id(value) in visited:
            continue
        if isinstance(value, PersistentId):
            reference = _storage_of(value)
            if reference is not None:
                yield reference[0], _BYTES.get(reference[1], 1)
        elif isinstance(value, dict | list | tuple | PickleRecord):
            visited.add(id(value))
            if isinstance(value, dict):
                todo.extend(value.values())
            else:
                todo.extend(value.arguments if isinstance(value, PickleRecord) else value)


def _storage_of(value: Any) -> tuple[str, str] | None:
    """Key and dtype of a storage: ``("storage", class, key, device, length, …)``."""
    parts = value.value if isinstance(value, PersistentId) else None
    if not isinstance(parts, tuple) or len(parts) < 5 or parts[0] != "storage" or not isinstance(parts[1], Global):
        return None
    module, _, name = parts[1].name.rpartition(".")
    is_storage = module.split(".")[0] == "torch" and name in _STORAGES and isinstance(parts[2], str)
    return (parts[2], _STORAGES[name]) if is_storage else None


def _view(value: Any) -> _View | None:
    """Return the tensor that a pickle record describes; None if it describes something else."""
    for _ in range(3):
        if not isinstance(value, PickleRecord):
            return None
        if value.function in _PARAMETER and value.arguments:
            value = value.arguments[0]
        elif value.function == _SUBCLASS and len(value.arguments) > 2 and isinstance(value.arguments[0], Global):
            inner = value.arguments[2]
            value = PickleRecord(value.arguments[0].name, inner if isinstance(inner, tuple) else ())
    if not isinstance(value, PickleRecord) or value.function not in _TENSOR or len(value.arguments) < 4:
        return None
    storage, offset, shape, strides = value.arguments[:4]
    reference = _storage_of(storage)
    if reference is None:
        return None
    key, dtype = reference
    if value.function.endswith("_v3") and len(value.arguments) > 6 and isinstance(value.arguments[6], Global):
        dtype = value.arguments[6].name.removeprefix("torch.")
    numbers = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else (None,)
    if not all(type(number) is int and number >= 0 for number in numbers) or not len(shape) == len(strides) <= MAX_RANK:
        return None
    if dtype not in _STORAGES.values():
        return None
    return _View(key, dtype, offset, shape, strides)


def _tensors(file: Path, content: Any, storages: Mapping[str, _Storage], entry: str) -> dict[str, StoredTensor]:
    if not isinstance(content, dict):
        kind = content.function if isinstance(content, PickleRecord) else type(content).__name__
        raise CheckpointError(f"{file} holds a {kind!s:.80}, expected a dict with a {entry}; use the training's file")
    state = content.get(entry, content)
    tensors = {}
    for name, value in state.items() if isinstance(state, dict) else ():
        view = _view(value)
        if isinstance(name, str) and view is not None:
            tensors[name] = _stored(file, name, view, storages)
    if not tensors:
        raise CheckpointError(
            f"{file}: no tensors in its state_dict, expected those of a model; use the training's file"
        )
    return tensors


def _stored(file: Path, name: str, view: _View, storages: Mapping[str, _Storage]) -> StoredTensor:
    """Check that a tensor is inside its storage, and that every element is stored."""
    storage, width = storages.get(view.key), _BYTES.get(view.dtype, 1)
    if storage is None or (view.offset + view.span) * width > storage.size or math.prod(view.shape) > view.span:
        size = "no storage" if storage is None else f"a storage of {storage.size} bytes"
        raise CheckpointError(
            f"{file}: tensor {name:.200} has shape {list(view.shape)}, strides {list(view.strides)} and {size}, "
            "expected a tensor inside of its storage; download the file again"
        )
    place = storage.start + view.offset * width
    return StoredTensor("checkpoint", name, file, view.shape, view.dtype, partial(_load, file, view, place))


def _load(file: Path, view: _View, place: int) -> torch.Tensor:
    dtype, count = getattr(torch, view.dtype), view.span
    if not count:
        return torch.empty(view.shape, dtype=dtype)
    buffer = bytearray(count * _BYTES.get(view.dtype, 1))
    with file.open("rb") as opened:
        opened.seek(place)
        if opened.readinto(buffer) != len(buffer):
            raise OSError("the file is shorter than before")
    return torch.frombuffer(buffer, dtype=dtype).as_strided(view.shape, view.strides)
