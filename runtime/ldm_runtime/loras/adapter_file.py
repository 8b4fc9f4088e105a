"""Reads the LoRA adapter of a bundle, a safetensors file, without the package safetensors. The file is untrusted.

The format is described at https://github.com/huggingface/safetensors#format. Tensors are named as PEFT names them:
``unet.MODULE.lora_A.weight`` is ``down``, ``unet.MODULE.lora_B.weight`` is ``up``, which includes alpha / rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import ManifestError
from ldm_runtime.json_fields import require_integer, require_list, require_object
from ldm_runtime.verified_file import VerifiedFile

__all__ = ["DOWN", "MAX_ADAPTER_BYTES", "UP", "LoraAdapter", "LowRankPair", "factors_fit", "read_adapter"]

DOWN, UP = "lora_A.weight", "lora_B.weight"
MAX_ADAPTER_BYTES = 8 * 2**30
"""Largest file of an adapter. Published adapters of Stable Diffusion XL have up to 2 GB."""
MAX_HEADER, MAX_LAYERS, MAX_RANK = 16 * 2**20, 20_000, 8192
MAX_SIZE = 2**31 - 1
_DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_KEY = re.compile(r"(\w+)\.(.+)\.(lora_[AB]\.weight)")


def factors_fit(down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """True if factors [R, in, …] and [out, R, …] change as many values as a weight [out, in, …] has."""
    if min(len(down), len(up)) < 2 or up[1] != down[0] or up[0] != weight[0]:
        return False
    return math.prod(up) == up[0] * up[1] and math.prod(down[1:]) == math.prod(weight[1:])


@dataclass(frozen=True, eq=False)
class LowRankPair:
    """The change of one weight: ``up @ down``, of rank R.

    Attributes:
        down: float32 or float16 [R, in, …], mapped.
        up: float32 or float16 [out, R, …], mapped.
    """

    down: NDArray[np.floating]
    up: NDArray[np.floating]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """As ``factors_fit``, for a weight of this shape."""
        return factors_fit(self.down.shape, self.up.shape, shape)

    def change(self, weight: float) -> NDArray[np.float32]:
        """``weight * up @ down`` as float32 [out, in * …]."""
        down, up = (factor.reshape(factor.shape[0], -1).astype(np.float32) for factor in (self.down, self.up))
        product: NDArray[np.float32] = up @ down
        product *= np.float32(weight)
        return product


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """The layers that an adapter changes.

    Attributes:
        name: Name in the bundle.
        pairs: Part ("unet", "text_encoder", …) and module -> its change.
        file: The file, which stays mapped.
    """

    name: str
    pairs: Mapping[tuple[str, str], LowRankPair]
    file: VerifiedFile


def read_adapter(name: str, file: VerifiedFile) -> LoraAdapter:
    """Map the factors of an adapter; values are read when they are used.

    Raises:
        ManifestError: The file is not an adapter as ``ldm-export add-lora`` writes it.
    """
    try:
        tensors = _tensors(file.path)
    except (ValueError, RecursionError, OSError, ManifestError) as error:
        raise ManifestError(f"{file.path}: no safetensors file ({error}); add the adapter again") from None
    file.check()
    sides: dict[tuple[str, str], dict[str, NDArray[np.floating]]] = {}
    for key, array in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ManifestError(f"{file.path}: tensor {key!r:.120} is not a LoRA factor; add the adapter again")
        sides.setdefault((match[1], match[2]), {})[match[3]] = array
    return LoraAdapter(name, {layer: _pair(file.path, layer, pair) for layer, pair in sides.items()}, file)


def _pair(file: Path, layer: tuple[str, str], sides: Mapping[str, NDArray[np.floating]]) -> LowRankPair:
    down, up = sides.get(DOWN), sides.get(UP)
    if down is None or up is None or min(down.ndim, up.ndim) < 2 or up.size != up.shape[0] * up.shape[1]:
        raise ManifestError(f"{file}: {'.'.join(layer):.120}: got no pair of factors; add the adapter again")
    if down.shape[0] != up.shape[1] or not 1 <= down.shape[0] <= MAX_RANK:
        got = f"ranks {down.shape[0]} and {up.shape[1]}, expected one from 1 to {MAX_RANK}"
        raise ManifestError(f"{file}: {'.'.join(layer):.120}: got {got}; add the adapter again")
    return LowRankPair(down, up)


def _tensors(path: Path) -> dict[str, NDArray[np.floating]]:
    content = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(content[:8].tobytes(), "little")
    if len(content) < 8 or not 2 <= size <= min(MAX_HEADER, len(content) - 8):
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(content[8 : 8 + size].tobytes())
    entries = require_object("header", header)
    entries.pop("__metadata__", None)
    if not 2 <= len(entries) <= 2 * MAX_LAYERS:
        raise ValueError(f"{len(entries)} tensors")
    return {key: _tensor(key, entry, content[8 + size :]) for key, entry in entries.items()}


def _tensor(key: str, value: Any, data: NDArray[np.uint8]) -> NDArray[np.floating]:
    entry = require_object(f"{key:.120}", value)
    dtype = _DTYPES.get(str(entry.get("dtype")))
    shape = [require_integer("shape", size, 1, MAX_SIZE) for size in require_list("shape", entry.get("shape"), 4)]
    offsets = [
        require_integer("offset", one, 0, len(data)) for one in require_list("offsets", entry.get("data_offsets"), 2)
    ]
    if dtype is None or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {key!r:.120} with dtype {entry.get('dtype')!r:.20}, shape {shape}, offsets {offsets}")
    part = data[offsets[0] : offsets[1]]
    aligned: NDArray[Any] = part if offsets[0] % dtype.itemsize == 0 else part.copy()
    return aligned.view(dtype).reshape(shape)
