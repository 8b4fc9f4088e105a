"""Estimates memory: the activations of a request, with a warning for large images, and a loaded bundle."""

from __future__ import annotations

import logging
import math

from ldm_runtime.bundle import Bundle
from ldm_runtime.bundle_layout import files_of_graph
from ldm_runtime.geometry import Geometry
from ldm_runtime.model import ModelDescription

__all__ = ["bundle_bytes", "report_memory", "required_bytes"]

log = logging.getLogger(__name__)


def required_bytes(model: ModelDescription, shape: tuple[int, int, int, int]) -> int | None:
    """Estimated bytes of activations; None if the bundle has no estimate.

    Args:
        model: Description of the model; a conditioning entry may have the setting "bytes_per_latent".
        shape: Shape of the latents: images, channels, height, width.
    """
    settings = {name: value for entry in model.conditioning for name, value in entry.settings.items()}
    if "bytes_per_latent" not in settings:
        return None
    return shape[0] * settings["bytes_per_latent"] * math.prod(shape[2:])


def report_memory(model: ModelDescription, shape: tuple[int, int, int, int], own: int) -> None:
    """Log a warning with the required memory if images have more latents than the model's default, ``own``."""
    required = required_bytes(model, shape)
    if required is not None and math.prod(shape[2:]) > own:
        log.warning(
            "memory: about %.1f GB beside the weights, as the image is larger than the model's own", required / 1e9
        )


def bundle_bytes(bundle: Bundle, precision: str | None = None) -> int:
    """Estimated bytes of a loaded bundle: its weights and, if the bundle has an estimate, activations of one image.

    Args:
        bundle: The bundle.
        precision: Precision of the graphs that run; None takes the precision that the bundle was built for.
    """
    manifest = bundle.manifest
    graphs = [part.graph(precision or bundle.precision) or part.graph("fp32") for part in manifest.components.values()]
    files = {name for graph in graphs if graph for name in files_of_graph(graph, manifest.files)}
    geometry = Geometry.of(manifest.model)
    shape = (1, geometry.channels, geometry.height.opt, geometry.width.opt)
    return sum(manifest.files[name].size for name in files) + (required_bytes(manifest.model, shape) or 0)
