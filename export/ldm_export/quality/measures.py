"""How two results are compared: by share of their scale, cosine and PSNR, on feeds that the model really sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.images import psnr
from ldm_runtime.pipeline import LatentDiffusionPipeline


@dataclass(frozen=True)
class Tolerance:
    """What is accepted: ``component`` as a share of the largest value, ``pixel`` in 1/255 at most, ``psnr`` in dB."""

    component: float
    pixel: int
    psnr: float


TOLERANCES = {
    "fp32": Tolerance(component=1e-3, pixel=1, psnr=0),
    "fp16": Tolerance(component=0.02, pixel=255, psnr=45),
    "bf16": Tolerance(component=0.1, pixel=255, psnr=30),
    "int8": Tolerance(component=0.5, pixel=255, psnr=25),
}
"""What is accepted of each precision unless told otherwise: fp32 draws the same picture, the others one close to it."""


@dataclass(frozen=True)
class ComponentResult:
    """One component on the same inputs as torch: largest |error| as a share of the largest |value|, cosine, PSNR dB.

    ``psnr`` is None where the two are equal.
    """

    name: str
    max_error: float
    cosine: float
    psnr: float | None


def real_feeds(pipeline: LatentDiffusionPipeline, prompts: Sequence[str]) -> dict[str, dict[str, NDArray[Any]]]:
    """Real inputs: the prompts' tokens and contexts, noise at timesteps from start to end, and latents."""
    rng = np.random.default_rng(0)
    geometry = pipeline.geometry
    tokens = pipeline.tokenizer(list(prompts)[: geometry.images])
    context = pipeline.backends["text_encoder"].run({"input_ids": tokens})["context"]
    shape = (len(tokens), geometry.channels, geometry.height.opt, geometry.width.opt)
    latents = rng.standard_normal(shape).astype(np.float32)
    timestep = np.linspace(1, pipeline.scheduler.num_train_timesteps - 1, len(tokens)).astype(np.int64)
    return {
        "text_encoder": {"input_ids": tokens},
        "unet": {"sample": latents, "timestep": timestep, "context": context},
        "decoder": {"latents": latents},
    }


def compared(name: str, got: NDArray[Any], expected: NDArray[Any]) -> ComponentResult:
    """How close one result is to another of the same shape."""
    one, other = got.astype(np.float64), expected.astype(np.float64)
    scale = float(np.abs(other).max()) or 1.0
    cosine = float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other) or 1.0))
    return ComponentResult(name, float(np.abs(one - other).max()) / scale, cosine, psnr(one, other, scale))
