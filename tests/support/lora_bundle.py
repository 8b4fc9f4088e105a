"""A bundle with two LoRA adapters: how it is made, and the images of a selection."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from safetensors.torch import save_file

from ldm_export.cli import main
from ldm_runtime import LatentDiffusionPipeline
from ldm_runtime.bundle import Bundle
from tests.support.lora_files import XL_PREFIXES, factors_of, kohya, peft

__all__ = ["BOTH", "OPTIONS", "PROMPT", "SMALL", "WHOLE", "Pixels", "image", "make_lora_bundle"]

WHOLE, SMALL = "whole", "small.style-2"
OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 3.0, "seed": 5}
PROMPT = "a red circle"
BOTH = {WHOLE: 0.5, SMALL: -1.0}
Pixels = NDArray[np.int64]


def weighted(module: Any) -> list[str]:
    """Names of the submodules with matrices or kernels."""
    named = [(name, getattr(one, "weight", None)) for name, one in module.named_modules()]
    return [name for name, weight in named if weight is not None and weight.ndim > 1 and "embeddings" not in name]


def write_files(checkpoint: Path, folder: Path) -> None:
    """Write a LoRA file that changes every layer of UNet and text encoder, and one of another form for some."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    factors = factors_of(pipeline, {part: weighted(getattr(pipeline, part)) for part in ("unet", "text_encoder")})
    factors = {layer: (0.4 * down, 0.4 * up) for layer, (down, up) in factors.items()}
    save_file(peft(factors), folder / f"{WHOLE}.safetensors")
    some = {layer: pair for layer, pair in factors.items() if layer[1].endswith((".to_v", "q_proj", "proj_in"))}
    save_file(kohya(some, False, {**XL_PREFIXES, "text_encoder": "lora_te_"}), folder / f"{SMALL}.safetensors")


def make_lora_bundle(checkpoint: Path, bundle: Bundle, folder: Path) -> None:
    """Write a copy of a bundle with the adapters ``WHOLE`` and ``SMALL``, and their files beside it."""
    shutil.copytree(bundle.folder, folder / "bundle")
    write_files(checkpoint, folder)
    given = [f"{name}={folder / name}.safetensors" for name in (WHOLE, SMALL)]
    assert main(["add-lora", str(folder / "bundle"), *given, "--quiet"]) == 0


def image(pipeline: LatentDiffusionPipeline, **options: Any) -> Pixels:
    """The image of ``PROMPT`` with ``OPTIONS``, int64 [H, W, 3]."""
    (result,) = pipeline(PROMPT, **{**OPTIONS, **options}).images
    return np.asarray(result, np.int64)
