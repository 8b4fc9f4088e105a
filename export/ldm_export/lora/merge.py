"""Merges LoRA files into the weights of a checkpoint's UNet and text encoders."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ldm_export.checkpoint.folder import Change, Checkpoint
from ldm_export.checkpoint.modules import parameter_shapes
from ldm_export.lora.lora_file import LowRank, read_lora
from ldm_export.originals.key_mapping import unet_name
from ldm_runtime.atomic_files import sha256
from ldm_runtime.errors import CheckpointError

__all__ = ["GivenLora", "parse_lora", "with_loras"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
MAX_SCALE = 1000.0
_COMPVIS = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")


@dataclass(frozen=True)
class GivenLora:
    """A LoRA file and the scale that its changes are multiplied by."""

    file: Path
    scale: float = 1.0


def parse_lora(text: str) -> GivenLora:
    """Read ``FILE`` or ``FILE:SCALE``. A folder stands for diffusers' file in it.

    Raises:
        CheckpointError: There is no such file, or the scale is out of range.
    """
    name, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon else 1.0
    except ValueError:
        name, scale = text, 1.0
    file = Path(name if colon and name else text)
    file = file / DIFFUSERS_FILE if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(f"lora: {file}: no such file, expected FILE or FILE:SCALE; check the path")
    if not abs(scale) <= MAX_SCALE:
        raise CheckpointError(f"lora: {file}: got scale {scale:g}, expected a number up to {MAX_SCALE:g}")
    return GivenLora(file, scale)


def with_loras(checkpoint: Checkpoint, given: Sequence[GivenLora]) -> Checkpoint:
    """A checkpoint whose weights are changed by LoRA files, one after the other, when its modules are loaded.

    Raises:
        CheckpointError: A file cannot be read, or a layer of it does not fit the checkpoint.
    """
    for lora in given:
        checkpoint = _with_lora(checkpoint, lora)
    return checkpoint


def _with_lora(checkpoint: Checkpoint, given: GivenLora) -> Checkpoint:
    layers = read_lora(given.file)
    facts = {"file": given.file.name, "sha256": sha256(given.file), "scale": given.scale}
    components = dict(checkpoint.components)
    for part in dict.fromkeys(layer.part for layer in layers):
        own = [layer for layer in layers if layer.part == part]
        if part not in components:
            raise CheckpointError(_refusal(given.file, own, len(layers), f"the checkpoint has no {part}"))
        component = components[part]
        changes = _changes(given, own, parameter_shapes(checkpoint, part), _res_blocks(component.config), len(layers))
        before = [*component.depends.get("loras", []), facts]
        components[part] = replace(
            component,
            changes=(*component.changes, changes),
            depends={**component.depends, "loras": before},
        )
    return replace(checkpoint, components=components, loras=(*checkpoint.loras, facts))


def _res_blocks(config: Mapping[str, object]) -> int:
    number = config.get("layers_per_block", 1)
    return number if isinstance(number, int) else 1


def _changes(
    given: GivenLora, layers: Sequence[LowRank], shapes: Mapping[str, tuple[int, ...]], res_blocks: int, total: int
) -> dict[str, Change]:
    """Parameter -> its change."""
    weights = {
        key.removesuffix(".weight").removeprefix("text_model.").replace(".", "_"): key
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) > 1
    }
    changes: dict[str, Change] = {}
    for layer in layers:
        key = weights.get(layer.module) or weights.get(_diffusers_name(layer.module, res_blocks))
        down, up = layer.down.shape, layer.up.shape
        if key is None:
            raise CheckpointError(_refusal(given.file, [layer], total, f"the {layer.part} has no such layer"))
        if not _fits(down, up, shapes[key]):
            got = f"factors {list(down)} and {list(up)} for weights {list(shapes[key])}"
            raise CheckpointError(_refusal(given.file, [layer], total, got))
        changes[key] = partial(_merged, layer, given.scale)
    return changes


def _diffusers_name(module: str, res_blocks: int) -> str:
    """The name of a module of the UNet that has the authors' name, with underscores."""
    if _COMPVIS.match(module) is None:
        return module
    dotted = re.sub(r"_(?=\d)|(?<=\d)_", ".", module)
    return unet_name(f"{dotted}.weight", res_blocks).removesuffix(".weight").replace(".", "_")


def _fits(down: tuple[int, ...], up: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    if min(len(down), len(up)) < 2 or up[1] != down[0] or up[0] != weight[0]:
        return False
    return math.prod(up) == up[0] * up[1] and math.prod(down[1:]) == math.prod(weight[1:])


def _merged(layer: LowRank, scale: float, weight: torch.Tensor) -> torch.Tensor:
    """The weight float32 [out, in, …] with the layer's change."""
    change = layer.up.read().flatten(1) @ layer.down.read().flatten(1)
    return weight + (scale * layer.factor) * change.reshape(weight.shape)


def _refusal(file: Path, layers: Sequence[LowRank], total: int, problem: str) -> str:
    return (
        f"{file}: {layers[0].key}: {problem}; of {total} LoRA layers all must fit the checkpoint: use a LoRA that was "
        "trained for this base model"
    )
