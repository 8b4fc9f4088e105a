"""Reads background and objects from images of the demo model by analysis by synthesis; no part of it is learned.

The background is the median colour. Every blob that differs from it is matched with the nearest palette colour and
with the drawing of a shape that overlaps it best. An attribute without a good match is None, and pixels
that belong to no object are counted as leftovers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_export_demo.drawing import PALETTE, PIXELS, RADIUS, coverage
from ldm_export_demo.grammar import BACKGROUNDS, COLOURS, SHAPES

__all__ = ["MIN_FIT", "FoundObject", "Reading", "read"]

COLOUR_TOLERANCE = 45.0
"""Maximum RGB distance to the nearest palette colour. Two palette colours are at least 85 apart."""
MIN_PURE = 0.8
"""Minimum share of an object's inner pixels within the tolerance of its colour."""
MIN_GROUND, MAX_SPREAD = 0.6, 15.0
"""Minimum share of background pixels (scenes have 0.76 and more) and their maximum mean RGB distance to its colour."""
MIN_FIT, MIN_MARGIN = 0.88, 0.05
"""Minimum soft IoU with the best shape, and minimum lead over the second. Scenes reach 0.92 and 0.11, after a blur of
one pixel 0.91 and 0.10. A diamond, an ellipse or a fat cross stay below 0.88, a square with round sides near 0.05."""
MAX_EDGE = 3.8
"""Maximum width of the soft edge of a shape, in pixels. Scenes: 1.1; after a blur of one pixel 2.8, of two 4.2 to 5."""
MAX_HALO = 4
"""Maximum width of the soft edge around an object, in pixels."""
SIZE_TOLERANCE = 2.5
"""Maximum distance of a radius to the nearest size, in pixels; the midpoint between two sizes is closer."""
MIN_BLOB = 24
"""Minimum number of pixels of an object; the smallest in a scene has 112. Smaller blobs are leftovers."""
MAX_RESIDUAL = 50.0
"""Maximum RGB distance between the 3×3 means of the image and its explanation; other pixels are leftovers."""
GAIN, STEPS = 2.0, (0.8, 0.4, 0.8, 0.4, 0.2)
"""Contrast of soft edges during fitting, and step sizes of the search for radius and centre, in pixels."""

Mask = NDArray[np.bool_]
Floats = NDArray[np.float32]
Fit = tuple[float, str, float, float, float]
"""Soft IoU, shape, radius, x, y."""

_CENTRES = np.arange(PIXELS, dtype=np.float32) + np.float32(0.5)
_UNIT = {shape: coverage(shape, 10.0, PIXELS / 2, PIXELS / 2) for shape in SHAPES}
_AREA = {shape: float(rendered.sum()) / 100 for shape, rendered in _UNIT.items()}  # of radius 1
_DROP = {
    shape: (float(rendered.sum(1) @ _CENTRES / rendered.sum()) - PIXELS / 2) / 10 for shape, rendered in _UNIT.items()
}


@dataclass(frozen=True)
class FoundObject:
    """One object read from pixels: centre (x, y) in pixels and ``fit``, the soft IoU with the best drawing.

    Colour, shape or size is None if nothing in the grammar matches well enough.
    """

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    fit: float


@dataclass(frozen=True)
class Reading:
    """Content of an image; ``leftovers`` is the number of pixels that neither background nor objects explain."""

    background: str | None
    objects: tuple[FoundObject, ...]
    leftovers: int


def read(image: NDArray[np.uint8]) -> Reading:
    """Read background and objects from an image, uint8 [64, 64, 3] RGB.

    If no even background fills most of the image, nothing else is read and every pixel is a leftover.

    Raises:
        ValueError: The image has another shape or dtype.
    """
    if image.shape != (PIXELS, PIXELS, 3) or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} {list(image.shape)}, expected uint8 [{PIXELS}, {PIXELS}, 3]")
    pixels = image.astype(np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    name = _nearest(ground)
    distance = np.linalg.norm(pixels - ground, axis=2)
    contrast = min(float(np.linalg.norm(ground - PALETTE[other])) for other in COLOURS if other != name) / 2
    near = distance < contrast
    if near.mean() < MIN_GROUND or distance[near].mean() > MAX_SPREAD:
        return Reading(None, (), distance.size)
    parts = _parts(distance, contrast)
    explained, objects = np.broadcast_to(ground, pixels.shape).copy(), []
    for part, reach in zip(parts, _reaches(parts), strict=True):
        inner = pixels[core if (core := ~_grow(~part)).any() else part]
        colour = np.median(inner, axis=0)
        axis = colour - ground
        alpha = (np.clip((pixels - ground) @ axis / (axis @ axis), 0, 1) * reach).astype(np.float32, copy=False)
        explained += alpha[..., None] * axis
        pure = np.mean(np.linalg.norm(inner - colour, axis=1) <= COLOUR_TOLERANCE) >= MIN_PURE
        objects.append(_explain(alpha, _nearest(colour) if pure else None))
    residual = np.linalg.norm(_blur(pixels - explained), axis=2)
    return Reading(name if name in BACKGROUNDS else None, tuple(objects), int((residual > MAX_RESIDUAL).sum()))


def _nearest(colour: Floats) -> str | None:
    distance, name = min((float(np.linalg.norm(colour - PALETTE[name])), name) for name in PALETTE)
    return name if distance <= COLOUR_TOLERANCE else None


def _parts(distance: Floats, contrast: float) -> list[Mask]:
    """Find blobs that differ from the background, cut at half their contrast so that soft edges do not join two."""
    parts = []
    for blob in _blobs(distance > contrast):
        level = float(np.percentile(distance[blob], 80)) / 2
        parts += [part for part in _blobs(blob & (distance > level)) if part.sum() >= MIN_BLOB]
    return parts


def _reaches(parts: list[Mask]) -> list[Mask]:
    """Extend every part by its soft edge, up to ``MAX_HALO`` pixels wide or to the edge of another part."""
    reaches = list(parts)
    for _ in range(MAX_HALO):
        for index, reach in enumerate(reaches):
            reaches[index] = reach | (_grow(reach) & ~np.any(reaches, axis=0))
    return reaches


def _explain(alpha: Floats, colour: str | None) -> FoundObject:
    solid = alpha > 0.5
    edge = 4 * float((alpha * (1 - alpha)).sum()) / max(int((solid & _grow(~solid)).sum()), 1)
    alpha = np.clip(GAIN * (alpha - np.float32(0.5)) + np.float32(0.5), 0, 1)
    starts = sorted((_start(alpha, shape) for shape in SHAPES), reverse=True)
    (fit, shape, radius, x, y), second = sorted((_refine(alpha, start) for start in starts[:2]), reverse=True)
    known = edge <= MAX_EDGE and fit >= MIN_FIT and fit - second[0] >= MIN_MARGIN
    nearest = min(RADIUS, key=lambda name: abs(RADIUS[name] - radius))
    size = nearest if abs(RADIUS[nearest] - radius) <= SIZE_TOLERANCE else None
    return FoundObject(colour if colour in COLOURS else None, shape if known else None, size, x, y, fit)


def _overlap(alpha: Floats, shape: str, radius: float, x: float, y: float) -> float:
    rendered = coverage(shape, radius, x, y)
    shared = float(np.minimum(alpha, rendered).sum())
    return shared / max(float(alpha.sum()) + float(rendered.sum()) - shared, 1.0)


def _start(alpha: Floats, shape: str) -> Fit:
    """Estimate the radius from the area and the centre from the centroid."""
    area = max(float(alpha.sum()), 1.0)
    radius = (area / _AREA[shape]) ** 0.5
    x, y = float(alpha.sum(0) @ _CENTRES) / area, float(alpha.sum(1) @ _CENTRES) / area - _DROP[shape] * radius
    return _overlap(alpha, shape, radius, x, y), shape, radius, x, y


def _refine(alpha: Floats, start: Fit) -> Fit:
    """Search for the radius and centre with the largest overlap, one coordinate at a time."""
    best, shape = start[:2]
    at = list(start[2:])
    for step in STEPS:
        for axis, move in ((0, step), (0, -step), (1, step), (1, -step), (2, step), (2, -step)):
            trial = at.copy()
            trial[axis] += move
            if (overlap := _overlap(alpha, shape, *trial)) > best:
                best, at = overlap, trial
    radius, x, y = at
    return best, shape, radius, x, y


def _grow(mask: Mask) -> Mask:
    edged = np.pad(mask, 1)
    return mask | edged[:-2, 1:-1] | edged[2:, 1:-1] | edged[1:-1, :-2] | edged[1:-1, 2:]


def _blur(field: Floats) -> Floats:
    edged = np.pad(field, ((1, 1), (1, 1), (0, 0)))
    rows = edged[:-2] + edged[1:-1] + edged[2:]
    blurred: Floats = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    return blurred


def _blobs(mask: Mask) -> list[Mask]:
    """Return the 4-connected components of a mask, in reading order."""
    width = PIXELS + 2
    waiting = dict.fromkeys(np.flatnonzero(np.pad(mask, 1)).tolist())
    blobs = []
    while waiting:
        blob = [next(iter(waiting))]
        del waiting[blob[0]]
        for at in blob:  # grows during the iteration
            for beside in (at - 1, at + 1, at - width, at + width):
                if beside in waiting:
                    del waiting[beside]
                    blob.append(beside)
        flat = np.zeros(width * width, bool)
        flat[blob] = True
        blobs.append(flat.reshape(width, width)[1:-1, 1:-1])
    return blobs
