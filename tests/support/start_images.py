"""Images and masks to start from, and the images that diffusers and the runtime make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ldm_runtime import LatentDiffusionPipeline

__all__ = ["IMAGE", "MASK", "assert_same", "drawing", "ours", "theirs"]

_NAMES = {
    "prompt": "prompts",
    "prompt_2": "prompts_2",
    "mask_image": "mask",
    "num_images_per_prompt": "images_per_prompt",
}
"""Names of diffusers, and ours."""


def drawing(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise for an image, an ellipse for a mask."""
    if mode == "RGB":
        return Image.fromarray(np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8))
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((width // 5, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
    return mask.convert(mode)


IMAGE, MASK = drawing(24, 17), drawing(24, 17, "L")


def theirs(pipeline: Any, seed: int | list[int], scheduler: Any = None, **options: Any) -> NDArray[np.int64]:
    """Images of diffusers, with the global generator or one for each image.

    Args:
        pipeline: A StableDiffusionInpaintPipeline or a StableDiffusionXLInpaintPipeline.
        seed: One, or one for each image.
        scheduler: Instead of the pipeline's.
        options: Of the call. A pipeline of the same parts answers it: for no image, an image, or one with a mask.
    """
    kinds: tuple[Any, ...] = (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
    made: dict[str, Any] = {"requires_safety_checker": False}
    if isinstance(pipeline, StableDiffusionXLInpaintPipeline):
        kinds = (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
        made = {"add_watermarker": False}
    parts = pipeline.components | ({} if scheduler is None else {"scheduler": scheduler})
    pipeline = kinds[("image" in options) + ("mask_image" in options)](**parts, **made)
    pipeline.set_progress_bar_config(disable=True)
    with torch.random.fork_rng(devices=[]):
        listed = isinstance(seed, list)
        generator = [torch.Generator().manual_seed(one) for one in seed] if listed else torch.manual_seed(seed)  # type: ignore[union-attr, arg-type]
        images = pipeline(generator=generator, **options).images
    return np.stack([np.asarray(image, np.int64) for image in images])


def ours(pipeline: LatentDiffusionPipeline, seed: Any, **options: Any) -> NDArray[np.int64]:
    """Images of the runtime for the options of diffusers' call."""
    fields: Any = {_NAMES.get(name, name): value for name, value in options.items()}
    return np.stack([np.asarray(image, np.int64) for image in pipeline(seed=seed, **fields).images])


def assert_same(one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """Images that are not flat and differ by 1/255 at most."""
    assert one.shape == other.shape and other.std() > 10
    assert np.abs(one - other).max() <= 1
