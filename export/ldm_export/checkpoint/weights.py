"""Reads the weight files of a component: lists tensors without reading their values, and reads tensors one by one.

Formats: safetensors (https://huggingface.co/docs/safetensors), and PyTorch state dicts, which are only unpickled as
tensors (``weights_only=True``). Both may be a single file, or shards that an ``*.index.json`` lists.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ldm_export.checkpoint.json_files import read_json, shortened
from ldm_runtime.backends.host import first_line
from ldm_runtime.errors import CheckpointError
from ldm_runtime.linked_files import stays_inside

__all__ = ["DTYPES", "FLOAT8", "StoredTensor", "read_safetensors", "read_weights", "weight_file"]

FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
"""8-bit dtypes. Values are read without scales; checkpoints with scales for them are refused."""
DTYPES = ("float64", "float32", "float16", "bfloat16", *FLOAT8)
"""Supported dtypes of weights, which are read as float32. Integers are not supported, because they need scales."""

_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_FIRST_RELEASE = "diffusion_model.pt"


@dataclass(frozen=True)
class StoredTensor:
    """Name, shape and dtype of one tensor of a weight file; ``read`` reads its values."""

    component: str
    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)

    def read(self) -> torch.Tensor:
        """Read the values as a contiguous float32 tensor of shape ``shape`` with its own memory.

        Raises:
            CheckpointError: The file can no longer be read, or a value is NaN or infinite.
        """
        where = f"{self.component}: {self.file}: tensor {self.name}"
        try:
            tensor = self.load().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            finite = not tensor.numel() or all(bound.isfinite() for bound in torch.aminmax(tensor))
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = first_line(error, 100)
            raise CheckpointError(f"{where} cannot be read: {reason}; download the file again") from error
        if not finite:
            raise CheckpointError(f"{where} holds NaN or infinite values, expected finite ones; use another checkpoint")
        return tensor


def read_weights(folder: Path, component: str) -> dict[str, StoredTensor]:
    """Return tensor name -> StoredTensor for the weights in ``folder``. Values are read from disk on use.

    The first of these files is used: full-precision safetensors, full-precision ``.bin``, then the same with the infix
    ``.fp16.`` and ``.bf16.``. ``component`` is for error messages.

    Raises:
        CheckpointError: There are no weights, a file is damaged or truncated, a ``.bin`` contains more than tensors, or
            a shard is missing, is outside the checkpoint, or lacks tensors that the index lists.
    """
    file = weight_file(folder, component)
    return _read_shards(file, component) if file.suffix == ".json" else _read_file(file, component)


def weight_file(folder: Path, component: str) -> Path:
    """Return the weight file or index of shards that ``read_weights`` uses.

    Raises:
        CheckpointError: There is none.
    """
    file = next((folder / name for name in _weight_names() if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{component}: no weights in {folder}, expected {_STEMS[0]}.safetensors, {_STEMS[2]}.bin or an index of "
            "shards; download the checkpoint whole, or use random weights to work from the configs alone"
        )
    return file


def _weight_names() -> Iterator[str]:
    for infix in ("", ".fp16", ".bf16"):
        for suffix in ("safetensors", "bin"):
            for stem in _STEMS:
                yield f"{stem}{infix}.{suffix}"
                yield f"{stem}.{suffix}.index{infix}.json"
    yield _FIRST_RELEASE


def _read_file(file: Path, component: str) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as opened:
            start = opened.read(40)
    except OSError as error:
        raise CheckpointError(f"{component}: {file} cannot be read: {error}; check its permissions") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{component}: {file} is a Git LFS pointer, not the weights; run git lfs pull")
    return (read_safetensors if file.suffix == ".safetensors" else _read_pickle)(file, component)


def read_safetensors(file: Path, component: str) -> dict[str, StoredTensor]:
    """Name -> tensor of a safetensors file; raises CheckpointError if it is damaged."""
    weights = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                entry = opened.get_slice(name)
                dtype = _SAFETENSORS_DTYPES.get(entry.get_dtype(), entry.get_dtype())
                load = partial(_load_safetensors, file, name)
                weights[name] = StoredTensor(component, name, file, tuple(entry.get_shape()), dtype, load)
    except (SafetensorError, OSError) as error:
        message = f"damaged or truncated ({first_line(error, 100)}), expected safetensors; download it again"
        raise CheckpointError(f"{component}: {file}: {message}") from error
    return weights


def _load_safetensors(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as opened:  # reopened for every tensor, so that pages read before are released
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def _read_pickle(file: Path, component: str) -> dict[str, StoredTensor]:
    """Read a state dict. Files of torch before 1.6 cannot be mapped and stay in memory until the dict is released."""
    where = f"{component}: {file}"
    _check_archive(file, where)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle raises many classes
        if "global" in str(error).lower():
            message = "holds objects other than tensors, which loading would run as code; get its safetensors version"
            raise CheckpointError(f"{where} {message}") from error
        message = f"damaged or truncated ({first_line(error, 100)}), expected a state dict; download it again"
        raise CheckpointError(f"{where}: {message}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds a {type(content).__name__}, expected a dict from names to tensors")
    weights = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            kind = f"{type(tensor).__name__} {getattr(tensor, 'layout', '')}".strip()
            raise CheckpointError(f"{where}: {name!r} is a {kind}, expected a dict from names to dense tensors only")
        stored = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > stored:
            raise CheckpointError(
                f"{where}: {name!r} has shape {list(tensor.shape)}, but only {stored} bytes are stored for it; "
                "use another checkpoint"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        weights[name] = StoredTensor(component, name, file, tuple(tensor.shape), dtype, tensor.detach)
    return weights


def _check_archive(file: Path, where: str) -> None:
    """Refuse a PyTorch archive whose entries are larger than the file, because torch writes them uncompressed.

    Raises:
        CheckpointError: Entries are compressed or overlap, or the directory of the archive is damaged.
    """
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        message = f"damaged or truncated ({first_line(error, 100)}), expected a state dict; download it again"
        raise CheckpointError(f"{where}: {message}") from error
    if size > file.stat().st_size:
        raise CheckpointError(
            f"{where}: {file.stat().st_size} bytes that inflate to {size}, expected entries that are not compressed; "
            "use another checkpoint"
        )


def _read_shards(index: Path, component: str) -> dict[str, StoredTensor]:
    weight_map = read_json(index, component).get("weight_map")
    where = f"{component}: {index}"
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f'{where}: expected "weight_map" from tensor names to file names; download it again')
    weights: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        listed = {name for name, file in weight_map.items() if file == shard}
        stored = _read_file(_shard_path(index, shard, where), component)
        if lost := listed - set(stored):
            raise CheckpointError(
                f"{where}: shard {shard} lacks {shortened(lost)}: the index lists {len(listed)} tensors in that shard, "
                f"it holds {len(stored)}; download both again"
            )
        weights |= {name: tensor for name, tensor in stored.items() if weight_map.get(name, shard) == shard}
    return weights


def _shard_path(index: Path, shard: str, where: str) -> Path:
    """Return the shard's file if it is in the index's folder; links into a Hugging Face cache are followed."""
    folder = index.parent.resolve()
    try:
        inside, exists = stays_inside(folder / shard, folder), (folder / shard).is_file()
    except (OSError, RuntimeError, ValueError):  # too long, a link to itself, a zero byte
        inside, exists = False, False
    if shard != Path(shard).name or not inside:
        raise CheckpointError(f"{where}: shard {shard!r} leads elsewhere, expected the name of a file in {folder}")
    if not exists:
        raise CheckpointError(f"{where}: shard {shard!r} is missing from {folder}; download the checkpoint whole")
    return folder / shard
