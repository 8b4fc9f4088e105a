"""Draws the reference images of the demo model, for its training and for its grader."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_export_demo.grammar import BACKGROUNDS, PLACES, SHAPES, SIZES, Sentence

__all__ = ["CELL", "PALETTE", "PIXELS", "RADIUS", "Figure", "Scene", "arrange", "coverage", "draw"]

PIXELS = 64
"""Width and height of every image."""
RADIUS = {"small": 8.0, "large": 12.0}
"""Half the extent of a shape, in pixels."""
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (240, 120, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "purple": (140, 60, 180),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
}
CELL = {0: 16.0, 1: 32.0, 2: 48.0}
"""Centre of each column and row of the 3×3 grid, in pixels."""
PLACE_JITTER, RELATION_JITTER = 2.0, 5.0


@dataclass(frozen=True)
class Figure:
    """One drawn object: colour and shape by name, radius and centre (x, y) in pixels."""

    colour: str
    shape: str
    radius: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """A background colour and the figures on it."""

    background: str
    figures: tuple[Figure, ...]


def coverage(shape: str, radius: float, x: float, y: float) -> NDArray[np.float32]:
    """Antialiased coverage of one shape: float32 [64, 64] in [0, 1], rows first, pixel centres at .5."""
    grid = np.arange(PIXELS, dtype=np.float32) + np.float32(0.5)
    dx, dy = grid[None, :] - np.float32(x), grid[:, None] - np.float32(y)

    def inside(distance: NDArray[np.float32]) -> NDArray[np.float32]:
        covered: NDArray[np.float32] = np.clip(distance + np.float32(0.5), 0, 1)
        return covered

    if shape == "circle":
        return inside(radius - np.sqrt(dx * dx + dy * dy))
    if shape == "square":
        half = 0.88 * radius
        return inside(half - np.abs(dx)) * inside(half - np.abs(dy))
    if shape == "triangle":
        slope = np.float32(1 / np.sqrt(5))  # base 2r, height 2r, apex up
        side = (dy + radius) * slope - np.abs(dx) * 2 * slope
        return inside(side) * inside(radius - dy)
    if shape == "cross":
        arm = 0.34 * radius
        across = inside(radius - np.abs(dx)) * inside(arm - np.abs(dy))
        down = inside(arm - np.abs(dx)) * inside(radius - np.abs(dy))
        both: NDArray[np.float32] = np.maximum(across, down)
        return both
    raise ValueError(f"shape {shape!r} is none of {', '.join(SHAPES)}")


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene as an image, uint8 [64, 64, 3] RGB."""
    image = np.empty((PIXELS, PIXELS, 3), np.float32)
    image[:] = PALETTE[scene.background]
    for figure in scene.figures:
        alpha = coverage(figure.shape, figure.radius, figure.x, figure.y)[..., None]
        image += alpha * (np.asarray(PALETTE[figure.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)


def arrange(sentence: Sentence, rng: np.random.Generator) -> Scene:
    """Generate a random scene that matches a sentence; attributes that the sentence leaves open come from ``rng``."""
    colours = {thing.colour for thing in sentence.things}
    free = [name for name in BACKGROUNDS if name not in colours]
    background = sentence.background or free[rng.integers(len(free))]
    figures = []
    for thing, (x, y) in zip(sentence.things, _centres(sentence, rng), strict=True):
        size = thing.size or SIZES[rng.integers(len(SIZES))]
        radius = RADIUS[size] + rng.uniform(-0.5, 0.5)
        figures.append(Figure(thing.colour, thing.shape, radius, x, y))
    return Scene(background, tuple(figures))


def _centres(sentence: Sentence, rng: np.random.Generator) -> list[tuple[float, float]]:
    if len(sentence.things) == 1:
        places = list(PLACES)
        column, row = PLACES[sentence.place or places[rng.integers(len(places))]]
        dx, dy = rng.uniform(-PLACE_JITTER, PLACE_JITTER, 2)
        return [(CELL[column] + dx, CELL[row] + dy)]
    near, far = (CELL[0] + rng.uniform(-2, 2), CELL[2] + rng.uniform(-2, 2))
    sides = CELL[1] + rng.uniform(-RELATION_JITTER, RELATION_JITTER, 2)
    if sentence.relation in ("right of", "below"):
        near, far = far, near
    if sentence.relation in ("above", "below"):
        return [(sides[0], near), (sides[1], far)]
    return [(near, sides[0]), (far, sides[1])]
