"""Memory of a request beside the weights, reported before it runs if its images are larger than the model's own."""

from __future__ import annotations

import logging
import math

from ldm_runtime.model import ModelDescription

__all__ = ["report_memory", "required_bytes"]

log = logging.getLogger(__name__)


def required_bytes(model: ModelDescription, shape: tuple[int, int, int, int]) -> int | None:
    """Estimated bytes of activations; None if the bundle does not tell.

    Args:
        model: Its conditioning has the setting "bytes_per_latent".
        shape: Of the latents: images, channels, height, width.
    """
    settings = {name: value for entry in model.conditioning for name, value in entry.settings.items()}
    if "bytes_per_latent" not in settings:
        return None
    return shape[0] * settings["bytes_per_latent"] * math.prod(shape[2:])


def report_memory(model: ModelDescription, shape: tuple[int, int, int, int], own: int) -> None:
    """Log a warning with the required memory for more latents per image than the model's ``own``."""
    required = required_bytes(model, shape)
    if required is not None and math.prod(shape[2:]) > own:
        log.warning(
            "memory: about %.1f GB beside the weights, as the image is larger than the model's own", required / 1e9
        )
