"""Optimization profiles: the shapes that an engine accepts and the shapes for which it is optimized."""

from __future__ import annotations

import re
from dataclasses import replace

from ldm_export.engine.request import Bounds, EngineRequest
from ldm_runtime.engine_facts import Profile
from ldm_runtime.errors import BuildError
from ldm_runtime.model import DENOISERS
from ldm_runtime.specs import Axis, ComponentSpec, Dim, TensorSpec, profile

__all__ = ["DEFAULT_IMAGES", "bounded", "latent_bounds", "parse_bounds", "profiles"]

DEFAULT_IMAGES: Bounds = (1, 1, 8)
"""Bounds of "batch", images of one call, if a request does not give them."""
_BOUNDS = re.compile(r"(\d{1,6})(?::(\d{1,6}):(\d{1,6}))?")


def parse_bounds(name: str, text: str) -> Bounds:
    """Read "min:opt:max", or one number for all three.

    Raises:
        BuildError: The text has another form, or 1 <= min <= opt <= max does not hold.
    """
    match = _BOUNDS.fullmatch(text)
    numbers = tuple(int(part or match[1]) for part in match.groups()) if match else ()
    if not numbers or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise BuildError(f"{name}: got {text!r:.40}, expected min:opt:max with 1 <= min <= opt <= max, as 1:1:8")
    return numbers[0], numbers[1], numbers[2]


def latent_bounds(name: str, pixels: Bounds, factor: int) -> Bounds:
    """Convert bounds of "height" or "width" from pixels to latents.

    Args:
        name: Name of the axis, for the message.
        pixels: Bounds in pixels.
        factor: Pixels per latent along the axis.

    Raises:
        BuildError: A bound is not a multiple of the factor.
    """
    if any(size % factor for size in pixels):
        raise BuildError(f"{name}: got {':'.join(map(str, pixels))} pixels, expected multiples of {factor}")
    return pixels[0] // factor, pixels[1] // factor, pixels[2] // factor


def bounded(spec: ComponentSpec, request: EngineRequest) -> ComponentSpec:
    """Narrow a spec to the bounds of a request.

    1. The UNet takes one row per image and guidance branch. The minimum is that of the smallest batch without guidance;
       the optimum is with guidance.
    2. A component that runs once per request takes one row per image, or all rows of the UNet.
    3. A component that runs once per schedule takes one row per timestep, so it keeps the range of its graph.
    4. All other components take one row per image.
    5. An axis without bounds is fixed to its usual size, and images are ``DEFAULT_IMAGES``.

    Raises:
        BuildError: The component's graph does not take a bound.
    """

    def dimension(dim: Dim) -> Dim:
        if isinstance(dim, int):
            return dim
        least, usual, most = _axis_bounds(spec, dim, request)
        if least < dim.min or most > dim.max:
            raise BuildError(
                f"{spec.name}: {dim.name} {least}:{usual}:{most} is beyond {dim.min}..{dim.max} of its graph; "
                "choose narrower bounds"
            )
        return Axis(dim.name, least, usual, most, dim.scale)

    def tensor(whole: TensorSpec) -> TensorSpec:
        return replace(whole, shape=tuple(map(dimension, whole.shape)))

    return replace(spec, inputs=tuple(map(tensor, spec.inputs)), outputs=tuple(map(tensor, spec.outputs)))


def _axis_bounds(spec: ComponentSpec, axis: Axis, request: EngineRequest) -> Bounds:
    bounds, rows = dict(request.bounds), request.rows_per_image
    if axis.name not in ("batch", "images"):
        return bounds.get(axis.name, (axis.opt, axis.opt, axis.opt))
    least, usual, most = images = bounds.get("batch", DEFAULT_IMAGES)
    if axis.name == "images":
        return images
    if spec.runs == "schedule":
        return axis.min, axis.opt, axis.max
    if spec.name in DENOISERS:
        return least, rows * usual, rows * most
    if spec.runs == "request":
        return least, usual, max(most, min(rows * most, axis.max))
    return images


def profiles(spec: ComponentSpec) -> tuple[Profile, ...]:
    """Return a static profile at the spec's usual shapes and, if the spec allows others, a wide one of all shapes."""
    wide = profile(spec)
    static = {name: (opt, opt, opt) for name, (_, opt, _) in wide.items()}
    return (static,) if static == wide else (static, wide)
