"""Descriptions of weight files that are not a whole model of a known kind, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["other_file"]

_MODELS = (
    (r"^control_model\.", "a ControlNet, an addition to a checkpoint"),
    (r"^conditioner\.embedders\.0\.model\.", "the refiner of Stable Diffusion XL"),
)
_OTHERS = (
    (r"lora_(up|down|A|B)\.|\.lora\.|^lora_", "LoRA weights, an addition to a checkpoint"),
    (r"^controlnet_|^input_hint_block\.", "a ControlNet, an addition to a checkpoint"),
    (r"^(model\.diffusion_model\.)?double_blocks\.", "FLUX, a transformer"),
    (r"^(model\.diffusion_model\.)?joint_blocks\.", "Stable Diffusion 3, a transformer"),
    (r"^emb_params$|^string_to_param", "an embedding of textual inversion, an addition to a checkpoint"),
    (r"^down_blocks\.", "a UNet of diffusers alone"),
    (r"^(first_stage_model\.)?(decoder|encoder)\.(conv_in|up|down|mid|mid_block)\.", "an autoencoder alone"),
    (r"^(text_model|encoder\.layers|model\.layers)\.", "a text encoder alone"),
)
"""Regular expression of a tensor's name -> description of the file, for files with and without a UNet of CompVis; the
first that matches any name is used."""
_UNET = "model.diffusion_model.input_blocks.0.0.weight"


def other_file(names: Iterable[str]) -> str | None:
    """Describe a file of tensors that is not a supported model; None if it is not recognised.

    Args:
        names: Names of its tensors.
    """
    listed = list(names)
    for pattern, kind in _MODELS if _UNET in listed else (*_MODELS, *_OTHERS):
        if any(re.search(pattern, name) for name in listed):
            return kind
    return None
