"""LoRA files: low-rank changes of a checkpoint's weights, merged when a module is loaded, or added to a bundle."""

from __future__ import annotations

from ldm_export.lora.adapter import Adapter, adapter_of
from ldm_export.lora.merge import lora_path, parse_lora, with_loras

__all__ = ["Adapter", "adapter_of", "lora_path", "parse_lora", "with_loras"]
