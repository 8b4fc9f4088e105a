"""Guidance scale conditioning: models distilled from guided models take the guidance scale as an input.

Latent consistency models (Luo et al. 2023, arXiv:2310.04378) evaluate one branch; an embedding of the scale is added to
the embedding of the timestep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.errors import ManifestError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.request import Request

__all__ = ["GuidanceScaleConditioner", "guidance_scale_embedding"]

F32 = NDArray[np.float32]
MIN_CHANNELS = 4


class GuidanceScaleConditioner:
    """Embeds the guidance scale of a request.

    Args:
        output: Name of the UNet's input.
        channels: Channels of the embedding.
    """

    kind: ClassVar[str] = "guidance_scale"
    fields: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, output: str, channels: int):
        self._output, self._channels = output, channels

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> GuidanceScaleConditioner:
        """Construct from a manifest entry with the setting "channels".

        Raises:
            ManifestError: The setting is missing or below 4, or the entry does not name one input.
        """
        channels = spec.settings.get("channels", 0)
        if len(spec.inputs) != 1 or channels < MIN_CHANNELS:
            raise ManifestError(f"conditioning: {cls.kind}: got {spec}, expected one input and channels; rebuild it")
        return cls(spec.inputs[0], channels)

    def images(self, request: Request) -> int:
        """1: the embedding is the same for all images of a request."""
        return 1

    def size(self, request: Request) -> tuple[int, int] | None:
        """None: the request decides the size."""
        return None

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """The embedding float32 [1, channels]; the request has a guidance scale."""
        assert request.guidance_scale is not None  # the planner fills it in
        return {self._output: guidance_scale_embedding(request.guidance_scale, self._channels)}

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def example(self) -> dict[str, Any]:
        """Nothing: the model's default scale."""
        return {}

    def close(self) -> None:
        """Nothing to free."""


def guidance_scale_embedding(scale: float, channels: int) -> F32:
    """Sines and cosines of 1000 (scale - 1) at geometric frequencies, float32 [1, channels].

    The same as get_guidance_scale_embedding of diffusers' pipelines, in float32.
    """
    half = channels // 2
    step = np.log(np.float32(10000)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32(np.float32(scale - 1) * np.float32(1000)) * frequencies
    embedding = np.zeros((1, channels), np.float32)
    embedding[0, : 2 * half] = np.concatenate([np.sin(angles), np.cos(angles)])
    return embedding
