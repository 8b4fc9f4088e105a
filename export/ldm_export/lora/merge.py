"""Merges LoRA files into the weights of a checkpoint's UNet and text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ldm_export.checkpoint.folder import Change, Checkpoint
from ldm_export.checkpoint.modules import parameter_shapes
from ldm_export.lora.lora_file import LowRank, read_lora
from ldm_export.lora.matching import match_layers, refusal
from ldm_runtime.atomic_files import sha256
from ldm_runtime.errors import CheckpointError

__all__ = ["GivenLora", "lora_path", "parse_lora", "with_loras"]

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
MAX_SCALE = 1000.0


@dataclass(frozen=True)
class GivenLora:
    """A LoRA file, and the scale by which its changes are multiplied."""

    file: Path
    scale: float = 1.0


def parse_lora(text: str) -> GivenLora:
    """Parse ``FILE`` or ``FILE:SCALE``. For a folder, diffusers' file in it is taken.

    Raises:
        CheckpointError: There is no such file, or the scale is out of range.
    """
    name, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon else 1.0
    except ValueError:
        name, scale = text, 1.0
    file = lora_path(name if colon and name else text, "FILE or FILE:SCALE")
    if not abs(scale) <= MAX_SCALE:
        raise CheckpointError(f"lora: {file}: got scale {scale:g}, expected a number up to {MAX_SCALE:g}")
    return GivenLora(file, scale)


def lora_path(text: str, expected: str) -> Path:
    """The LoRA file of a path; a folder stands for diffusers' file in it.

    Raises:
        CheckpointError: There is no such file; the message says what was ``expected``.
    """
    file = Path(text)
    file = file / DIFFUSERS_FILE if file.is_dir() else file
    if not file.is_file():
        raise CheckpointError(f"lora: {file}: no such file, expected {expected}; check the path")
    return file


def with_loras(checkpoint: Checkpoint, given: Sequence[GivenLora]) -> Checkpoint:
    """Return a checkpoint whose weights are changed by LoRA files, one after the other, when its modules are loaded.

    Raises:
        CheckpointError: A file cannot be read, or one of its layers does not fit the checkpoint.
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
            raise CheckpointError(refusal(given.file, own, len(layers), f"the checkpoint has no {part}"))
        component = components[part]
        shapes, res_blocks = parameter_shapes(checkpoint, part), _res_blocks(component.config)
        matched = match_layers(given.file, own, shapes, res_blocks, len(layers))
        changes: dict[str, Change] = {key: partial(_merged, layer, given.scale) for key, layer in matched.items()}
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


def _merged(layer: LowRank, scale: float, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight float32 [out, in, …] with the layer's change."""
    change = layer.up.read().flatten(1) @ layer.down.read().flatten(1)
    return weight + (scale * layer.factor) * change.reshape(weight.shape)
