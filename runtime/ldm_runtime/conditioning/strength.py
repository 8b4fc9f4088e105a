"""Strength of image to image and inpainting: the share of the denoising steps that run on an image."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ldm_runtime.errors import ManifestError, SpecError

__all__ = ["STRENGTHS", "default_strengths", "skipped_steps", "strength_settings"]

STRENGTHS = (0.8, 1.0)
"""Default strength without and with a mask: those of diffusers' pipelines of Stable Diffusion 1.x and 2.x."""
_NAMES = ("image_strength", "mask_strength")
"""Settings of a manifest, in ten-thousandths, because settings are whole numbers."""
_WHOLE = 10_000


def strength_settings(image: float, mask: float) -> dict[str, int]:
    """Settings of a manifest for default strengths without and with a mask, above 0 and at most 1."""
    return {name: round(strength * _WHOLE) for name, strength in zip(_NAMES, (image, mask), strict=True)}


def default_strengths(settings: Mapping[str, int]) -> tuple[float, float]:
    """Default strength without and with a mask, from the settings of a manifest; ``STRENGTHS`` where they have none.

    Raises:
        ManifestError: A setting is not a share above 0.
    """
    known = {**strength_settings(*STRENGTHS), **settings}
    for name in _NAMES:
        if not 1 <= known[name] <= _WHOLE:
            raise ManifestError(f"conditioning: {name}: got {known[name]}, expected 1 to {_WHOLE}; rebuild the bundle")
    image, mask = (known[name] / _WHOLE for name in _NAMES)
    return image, mask


def skipped_steps(strength: float, steps: int) -> int:
    """Number of steps to skip at the start, as in diffusers.

    Args:
        strength: Share of the steps that run.
        steps: Number of all steps.

    Raises:
        SpecError: No step would run.
    """
    left = min(int(steps * strength), steps)
    if left < 1:
        least = math.ceil(1e4 / steps) / 1e4
        raise SpecError(
            f"strength: got {strength:g} with {steps} steps, which leaves none, expected at least {least:g}; "
            "take a higher strength or more steps"
        )
    return steps - left
