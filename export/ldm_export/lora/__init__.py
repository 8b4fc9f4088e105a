"""LoRA files: low-rank changes of a checkpoint's weights, merged when a module is loaded."""

from __future__ import annotations

from ldm_export.lora.merge import parse_lora, with_loras

__all__ = ["parse_lora", "with_loras"]
