"""Optimization profiles: between which shapes an engine works, and at which it works best."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ldm_runtime.engine_facts import Profile
from ldm_runtime.errors import BuildError
from ldm_runtime.specs import Axis, ComponentSpec, TensorSpec, profile

Bounds = tuple[int, int, int]
GUIDED = ("unet",)
"""Components that take two rows for each image with guidance, and one without."""
MOST_IMAGES = 8
"""Images of one call where no --batch is given."""
_BOUNDS = re.compile(r"(\d{1,6})(?::(\d{1,6}):(\d{1,6}))?")


def parse_bounds(name: str, text: str) -> Bounds:
    """Parse "min:opt:max", or one number for all three.

    Raises:
        BuildError: not such a text, or not 1 <= min <= opt <= max.
    """
    found = _BOUNDS.fullmatch(text)
    numbers = tuple(int(part or found[1]) for part in found.groups()) if found else ()
    if not numbers or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise BuildError(f"{name}: got {text!r:.40}, expected min:opt:max with 1 <= min <= opt <= max, as 1:1:8")
    return numbers[0], numbers[1], numbers[2]


def bounded(spec: ComponentSpec, bounds: Mapping[str, Bounds], factor: int) -> ComponentSpec:
    """The spec within bounds a user gave.

    Args:
        bounds: "batch" in images, "height" and "width" in pixels; what is left out: 1 to MOST_IMAGES images, best at
            one, and the model's own size alone.
        factor: pixels of one latent.

    Raises:
        BuildError: a bound the component's graph does not take, or pixels that are no multiple of the factor.
    """

    def dimension(dim: Axis | int) -> Axis | int:
        if isinstance(dim, int):
            return dim
        least, best, most = _latent_bounds(spec.name, dim, bounds, factor)
        if least < dim.min or most > dim.max:
            raise BuildError(
                f"{spec.name}: {dim.name} {least}:{best}:{most} is beyond {dim.min}..{dim.max} of its graph; "
                "choose narrower bounds"
            )
        return Axis(dim.name, least, best, most, dim.scale)

    def tensor(given: TensorSpec) -> TensorSpec:
        return replace(given, shape=tuple(map(dimension, given.shape)))

    return replace(spec, inputs=tuple(map(tensor, spec.inputs)), outputs=tuple(map(tensor, spec.outputs)))


def _latent_bounds(component: str, axis: Axis, bounds: Mapping[str, Bounds], factor: int) -> Bounds:
    if axis.name == "images":
        return bounds.get("batch", (1, 1, MOST_IMAGES))
    if axis.name == "batch":
        least, best, most = bounds.get("batch", (1, 1, MOST_IMAGES))
        return (least, 2 * best, 2 * most) if component in GUIDED else (least, best, most)
    if axis.name not in bounds:
        return axis.opt, axis.opt, axis.opt
    pixels = bounds[axis.name]
    if any(size % factor for size in pixels):
        raise BuildError(f"{axis.name}: got {':'.join(map(str, pixels))} pixels, expected multiples of {factor}")
    return pixels[0] // factor, pixels[1] // factor, pixels[2] // factor


def profiles(spec: ComponentSpec) -> tuple[Profile, ...]:
    """A static profile at the spec's usual shapes and, where it allows others, a wide one of all of them."""
    wide = profile(spec)
    static = {name: (opt, opt, opt) for name, (_, opt, _) in wide.items()}
    return (static,) if static == wide else (static, wide)
