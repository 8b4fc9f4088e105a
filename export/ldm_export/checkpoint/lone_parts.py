"""Recognises folders that are only a part of a checkpoint, or an addition to one."""

from __future__ import annotations

from pathlib import Path

from ldm_export.checkpoint.json_files import read_json
from ldm_runtime.errors import CheckpointError

__all__ = ["lone_part"]

LORA = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json")
_KINDS = {
    "AutoencoderKL": "an autoencoder alone",
    "VQModel": "an autoencoder alone",
    "AutoencoderTiny": "a tiny autoencoder alone",
    "UNet2DConditionModel": "a UNet alone",
    "UNet2DModel": "a UNet alone",
    "ControlNetModel": "a ControlNet, an addition to a checkpoint",
    "T2IAdapter": "a T2I adapter, an addition to a checkpoint",
    "MotionAdapter": "a motion adapter, an addition to a checkpoint",
    "CLIPTextModel": "a text encoder alone",
    "StableDiffusionSafetyChecker": "a safety checker alone",
}


def lone_part(folder: Path) -> str | None:
    """Describe the content of a folder without model_index.json as a phrase; None if it is not recognised."""
    if any((folder / name).exists() for name in LORA):
        return "LoRA weights, an addition to a checkpoint"
    try:
        config = read_json(folder / "config.json", "checkpoint")
    except CheckpointError:
        return None
    listed = config.get("architectures")
    names = (config.get("_class_name"), *(listed if isinstance(listed, list) else ()))
    known = [_KINDS.get(name, f"one {name[:60]!r} alone") for name in names if isinstance(name, str)]
    return known[0] if known else None
