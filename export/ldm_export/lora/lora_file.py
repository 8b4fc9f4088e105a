"""Reads LoRA files of several programs, and names their layers by the modules that they change.

LoRA is described by Hu et al. 2021, arXiv:2106.09685. Supported are the keys of PEFT and diffusers
(``unet.….lora_A.weight``, ``.lora.down.weight``, ``.processor.to_q_lora.down.weight``) and of kohya's scripts
(``lora_unet_….lora_down.weight`` with ``.alpha``), with diffusers' or the original authors' names of the UNet's blocks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ldm_export.checkpoint.weights import StoredTensor
from ldm_export.originals.checkpoint_file import read_state_dict
from ldm_runtime.errors import CheckpointError

__all__ = ["LowRank", "read_lora"]

_FACTORS = (
    (r"(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight", r"\1"),
    (r"(.+)\.lora_(down|up)\.weight", r"\1"),
    (r"(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight", r"\1"),
    (r"(.+)\.processor\.to_out_lora\.(down|up)\.weight", r"\1.to_out.0"),
    (r"(.+)\.processor\.(?:to_[qkv])_lora\.(down|up)\.weight", ""),
)
"""Regular expressions of the names of factors: the module that a factor changes, and as last group which factor it
is."""
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_[qkv])_lora\.(?:down|up)\.weight")
_ALPHA = re.compile(r"(.+?)(?:\.lora)?\.alpha")
_OTHER_KINDS = (
    (r"\.(dora_scale|lora_magnitude_vector)\b", "DoRA, which also changes the length of weights"),
    (r"\.hada_", "LoHa, products of low-rank matrices"),
    (r"\.lokr_", "LoKr, Kronecker products"),
    (r"\.lora_mid\b", "LoCon with a middle factor"),
    (r"\.oft_", "OFT, rotations of weights"),
    (r"\.diff(_b)?$", "whole differences of weights"),
)
_PARTS = (
    (r"^lora_unet_", "unet"),
    (r"^lora_te2_", "text_encoder_2"),
    (r"^lora_te1?_", "text_encoder"),
    (r"^unet\.", "unet"),
    (r"^text_encoder_2\.", "text_encoder_2"),
    (r"^text_encoder\.", "text_encoder"),
    (r"^base_model\.model\.", "unet"),
    (r"^(?=(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b)", "unet"),
)
"""(Prefix of a key, part of the checkpoint) pairs; the first match is used."""
_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True)
class LowRank:
    """Change of one layer's weights: ``factor * up @ down``.

    Attributes:
        key: Name of ``down`` in the file.
        part: Part of the checkpoint, e.g. "unet".
        module: Name of the module in that part, with underscores instead of points.
        down: [rank, in, …].
        up: [out, rank, …].
        factor: alpha / rank.
    """

    key: str
    part: str
    module: str
    down: StoredTensor
    up: StoredTensor
    factor: float


def read_lora(file: Path) -> list[LowRank]:
    """Read the layers of a LoRA file; values are read when they are used.

    Raises:
        CheckpointError: The file cannot be read, contains no layers or another kind of change, or a key has an unknown
            form.
    """
    tensors = read_state_dict(file)
    for pattern, kind in _OTHER_KINDS:
        if found := next((key for key in tensors if re.search(pattern, key)), None):
            raise CheckpointError(f"{file}: {found}: got {kind}, expected LoRA; other kinds are not supported")
    factors: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    for key in tensors:
        if (named := _ALPHA.fullmatch(key)) is not None:
            alphas[named[1]] = key
        else:
            module, side = _factor(file, key)
            factors.setdefault(module, {})[side] = key
    if not factors:
        raise CheckpointError(f"{file}: got no LoRA layers, expected keys such as unet.….lora_A.weight; check the file")
    adapters = _adapters(file)
    layers = []
    for module, sides in factors.items():
        if len(sides) != 2:
            raise CheckpointError(f"{file}: {next(iter(sides.values()))}: got one factor of two; download it again")
        part, name = _place(file, sides["down"], module)
        down, up = tensors[sides["down"]], tensors[sides["up"]]
        rank = down.shape[0] if down.shape else 0
        alpha = _alpha(tensors[alphas[module]]) if module in alphas else adapters.get(part, float(rank))
        layers.append(LowRank(sides["down"], part, name, down, up, alpha / max(1, rank)))
    return layers


def _factor(file: Path, key: str) -> tuple[str, str]:
    """Return the module that a key changes, and "down" or "up"."""
    for pattern, module in _FACTORS:
        if (match := re.fullmatch(pattern, key)) is not None:
            side = {"A": "down", "B": "up"}.get(match.groups()[-1], match.groups()[-1])
            processor = _PROCESSOR.fullmatch(key)
            return f"{processor[1]}.{processor[2]}" if processor else match.expand(module), side
    raise CheckpointError(
        f"{file}: key {key[:120]} is of no known form of LoRA; give a LoRA file of diffusers or kohya"
    )


def _place(file: Path, key: str, module: str) -> tuple[str, str]:
    for pattern, part in _PARTS:
        if (match := re.match(pattern, module)) is not None:
            name = module[match.end() :].replace(".", "_")
            return part, name.removeprefix("text_model_")
    raise CheckpointError(f"{file}: key {key[:120]} is of no part that is known, expected unet or text_encoder")


def _alpha(stored: StoredTensor) -> float:
    if math.prod(stored.shape) != 1:
        raise CheckpointError(f"{stored.file}: {stored.name}: got shape {list(stored.shape)}, expected one number")
    return float(stored.read().reshape(()))


def _adapters(file: Path) -> dict[str, float]:
    """Return part -> alpha, from the PEFT configs that diffusers writes into the metadata of its files.

    Raises:
        CheckpointError: A config has more than one alpha for a part.
    """
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            config = json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return _alphas_of(file, config if isinstance(config, dict) else {})


def _alphas_of(file: Path, config: Mapping[str, Any]) -> dict[str, float]:
    alphas = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for option in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias"):
            if config.get(f"{part}.{option}"):
                raise CheckpointError(f"{file}: {part}.{option} is set in its metadata, which is not supported")
        alpha = config.get(f"{part}.lora_alpha")
        if isinstance(alpha, int | float) and not isinstance(alpha, bool):
            alphas[part] = float(alpha)
    return alphas
