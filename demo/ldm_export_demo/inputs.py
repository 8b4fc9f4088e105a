"""Inputs of the super-resolution and the inpainting model: small images, masks, and held-out scenes with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_export_demo.drawing import PIXELS, Figure, arrange, draw
from ldm_export_demo.grammar import parse, trial_prompts

__all__ = [
    "FACTOR",
    "MASKS",
    "MaskedImage",
    "figure_mask",
    "low_resolution",
    "masked_trials",
    "rectangle_mask",
    "trial_images",
]

FACTOR = 4
"""Pixels of a large image along each side of a pixel of the small one."""
MASKS = ("part", "object")
"""Kinds of masks: a rectangle that hides about half of an object, and one that hides it as a whole."""
MARGIN = (3.0, 7.0)
"""Smallest and largest distance of an object to the edges of the rectangle that hides it, in pixels."""
CUT = (0.4, 0.6)
"""Smallest and largest share of that rectangle that a mask of a part leaves out on one side."""
SIDES = (10, 33)
"""Range of the sides of a rectangle anywhere in the image, in pixels."""
SEED = 12

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class MaskedImage:
    """An image uint8 [64, 64, 3], the mask uint8 [64, 64] that is 255 where it is redrawn, and the kind of the mask."""

    image: Pixels
    mask: Pixels
    kind: str


def low_resolution(image: Pixels) -> Pixels:
    """Make an image, uint8 [64, 64, 3], smaller by ``FACTOR``: the rounded mean of each block, uint8 [16, 16, 3]."""
    side = PIXELS // FACTOR
    blocks = image.reshape(side, FACTOR, side, FACTOR, 3).astype(np.float32)
    small: Pixels = np.rint(blocks.mean((1, 3))).astype(np.uint8)
    return small


def figure_mask(figure: Figure, kind: str, rng: np.random.Generator) -> Pixels:
    """A mask, uint8 [64, 64], of a figure; ``kind`` is one of ``MASKS``.

    Raises:
        ValueError: The kind is another.
    """
    if kind not in MASKS:
        raise ValueError(f"mask: got {kind!r}, expected {' or '.join(MASKS)}")
    left, top, right, bottom = rng.uniform(*MARGIN, 4) + figure.radius
    box = [figure.x - left, figure.y - top, figure.x + right, figure.y + bottom]
    if kind == "part":
        side, share = rng.integers(4), rng.uniform(*CUT)
        opposite = (side + 2) % 4
        box[side] += share * (box[opposite] - box[side])
    return _rectangle(*box)


def rectangle_mask(rng: np.random.Generator) -> Pixels:
    """A mask, uint8 [64, 64], of a random rectangle anywhere in the image."""
    width, height = rng.integers(*SIDES, 2)
    left, top = rng.integers(0, PIXELS - width), rng.integers(0, PIXELS - height)
    return _rectangle(left, top, left + width, top + height)


def trial_images(count: int) -> list[Pixels]:
    """Images, each uint8 [64, 64, 3], of held-out sentences, reproducible; one third of them shows one object."""
    rng = np.random.default_rng(SEED)
    return [draw(arrange(parse(prompt), rng)) for prompt in trial_prompts(count)]


def masked_trials(count: int, kinds: tuple[str, ...] = MASKS) -> list[MaskedImage]:
    """Images of held-out sentences with masks of one of their objects, reproducible; ``kinds`` of masks alternate."""
    rng = np.random.default_rng(SEED)
    trials = []
    for index, prompt in enumerate(trial_prompts(count)):
        scene, kind = arrange(parse(prompt), rng), kinds[index % len(kinds)]
        figure = scene.figures[rng.integers(len(scene.figures))]
        trials.append(MaskedImage(draw(scene), figure_mask(figure, kind, rng), kind))
    return trials


def _rectangle(left: float, top: float, right: float, bottom: float) -> Pixels:
    """A mask whose edges are rounded to multiples of ``FACTOR``, so that no latent is masked in part."""
    mask = np.zeros((PIXELS, PIXELS), np.uint8)
    left, top, right, bottom = (max(round(side / FACTOR), 0) * FACTOR for side in (left, top, right, bottom))
    rows, columns = slice(top, bottom), slice(left, right)
    mask[rows, columns] = 255
    return mask
