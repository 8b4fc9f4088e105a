"""Finds the weights that the layers of a LoRA file change, and checks that the factors fit them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm_export.lora.lora_file import LowRank
from ldm_export.originals.key_mapping import unet_name
from ldm_runtime.errors import CheckpointError
from ldm_runtime.loras.adapter_file import factors_fit

__all__ = ["match_layers", "refusal"]

_COMPVIS = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")


def match_layers(
    file: Path, layers: Sequence[LowRank], shapes: Mapping[str, tuple[int, ...]], res_blocks: int, total: int
) -> dict[str, LowRank]:
    """Parameter -> the layer that changes it.

    Args:
        file: The LoRA file, for messages.
        layers: Its layers of one part of the checkpoint.
        shapes: Name of each parameter of the part, e.g. "conv_in.weight" -> its shape.
        res_blocks: Residual blocks of a level, for the authors' names of a UNet's blocks.
        total: Layers of the whole file.

    Raises:
        CheckpointError: The part has no such layer, or factors do not fit it.
    """
    weights = {
        key.removesuffix(".weight").removeprefix("text_model.").replace(".", "_"): key
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) > 1
    }
    matched: dict[str, LowRank] = {}
    for layer in layers:
        key = weights.get(layer.module) or weights.get(_diffusers_name(layer.module, res_blocks))
        down, up = layer.down.shape, layer.up.shape
        if key is None:
            raise CheckpointError(refusal(file, [layer], total, f"the {layer.part} has no such layer"))
        if not factors_fit(down, up, shapes[key]):
            got = f"factors {list(down)} and {list(up)} for weights {list(shapes[key])}"
            raise CheckpointError(refusal(file, [layer], total, got))
        matched[key] = layer
    return matched


def _diffusers_name(module: str, res_blocks: int) -> str:
    """The name of a module of the UNet that has the authors' name, with underscores."""
    if _COMPVIS.match(module) is None:
        return module
    dotted = re.sub(r"_(?=\d)|(?<=\d)_", ".", module)
    return unet_name(f"{dotted}.weight", res_blocks).removesuffix(".weight").replace(".", "_")


def refusal(file: Path, layers: Sequence[LowRank], total: int, problem: str) -> str:
    """The message about layers that do not fit the checkpoint."""
    return (
        f"{file}: {layers[0].key}: {problem}; of {total} LoRA layers all must fit the checkpoint: use a LoRA that was "
        "trained for this base model"
    )
