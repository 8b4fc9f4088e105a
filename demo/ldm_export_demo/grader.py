"""Grades images of the demo model against their prompts.

An attribute that cannot be read counts as wrong. The object count is wrong if any pixels remain unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from ldm_export_demo.drawing import CELL
from ldm_export_demo.grammar import PLACES, Sentence, Thing, parse
from ldm_export_demo.reader import FoundObject, Reading, read

__all__ = ["ATTRIBUTES", "Accuracy", "Counters", "Grade", "accuracy", "compare", "grade", "summarise"]

ATTRIBUTES = ("background", "count", "colour", "shape", "size", "position")
MAX_LEFTOVERS = 10
"""Maximum number of unexplained pixels in a correct image. Scenes have none, a foreign spot of 4×4 pixels leaves 12."""
PLACE_TOLERANCE, RELATION_DISTANCE = 6.0, 8.0
"""Maximum distance to a cell's centre and minimum distance of two centres along the relation's axis, in pixels."""


@dataclass(frozen=True)
class Grade:
    """Attributes of an image that match its sentence. Attributes that the sentence leaves open count as correct."""

    background: bool
    count: bool
    colour: bool
    shape: bool
    size: bool
    position: bool

    @property
    def correct(self) -> bool:
        """True if every attribute is correct."""
        return all(getattr(self, name) for name in ATTRIBUTES)


@dataclass(frozen=True)
class Counters:
    """Number of images and the shares, in [0, 1], that are correct as a whole and in each attribute."""

    number: int
    correct: float
    background: float
    count: float
    colour: float
    shape: float
    size: float
    position: float


@dataclass(frozen=True)
class Accuracy:
    """Counts over all images and over those of one-object and two-object sentences; None if there are none."""

    overall: Counters
    one_object: Counters | None
    two_objects: Counters | None


def accuracy(images: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> Accuracy:
    """Grade images, each uint8 [64, 64, 3], against their prompts.

    Raises:
        ValueError: There are no images, not one prompt per image, or a prompt outside the grammar.
    """
    sentences = [parse(prompt) for prompt in prompts]
    return summarise([grade(image, s) for image, s in zip(images, sentences, strict=True)], sentences)


def summarise(grades: Sequence[Grade], sentences: Sequence[Sentence]) -> Accuracy:
    """Summarise grades as shares of correct images.

    Raises:
        ValueError: There are no grades.
    """
    pairs = list(zip(grades, sentences, strict=True))
    overall = _counted(list(grades))
    if overall is None:
        raise ValueError("no images to grade: expected at least one")
    one, two = ([item for item, sentence in pairs if len(sentence.things) == count] for count in (1, 2))
    return Accuracy(overall, _counted(one), _counted(two))


def _counted(grades: list[Grade]) -> Counters | None:
    shares = [sum(getattr(item, name) for item in grades) / max(len(grades), 1) for name in ("correct", *ATTRIBUTES)]
    return Counters(len(grades), *shares) if grades else None


def grade(image: NDArray[np.uint8], sentence: Sentence) -> Grade:
    """Compare an image, uint8 [64, 64, 3] RGB, with its sentence."""
    return compare(read(image), sentence)


def compare(reading: Reading, sentence: Sentence) -> Grade:
    """Compare the objects read from an image with a sentence.

    Objects are assigned to the described things so that most attributes agree, then so that the positions agree.
    """
    things = sentence.things
    objects = reading.objects + (None,) * (len(things) - len(reading.objects))
    best = max(_agreement(sentence, chosen) for chosen in permutations(objects, len(things)))
    _, position, colour, shape, size = best
    background = sentence.background in (None, reading.background)
    count = len(reading.objects) == len(things) and reading.leftovers <= MAX_LEFTOVERS
    return Grade(background, count, colour, shape, size, position)


def _agreement(sentence: Sentence, objects: tuple[FoundObject | None, ...]) -> tuple[int, bool, bool, bool, bool]:
    """Return the number of matching attributes, and whether position, colour, shape and size of all things match."""

    def agree(thing: Thing, located: FoundObject | None) -> tuple[bool, bool, bool]:
        if located is None:
            return False, False, False
        return located.colour == thing.colour, located.shape == thing.shape, thing.size in (None, located.size)

    agreed = [agree(thing, located) for thing, located in zip(sentence.things, objects, strict=True)]
    colour, shape, size = (all(column) for column in zip(*agreed, strict=True))
    return sum(map(sum, agreed)), _in_position(sentence, objects), colour, shape, size


def _in_position(sentence: Sentence, objects: tuple[FoundObject | None, ...]) -> bool:
    present = [one for one in objects if one is not None]
    if len(present) < len(objects):
        return False
    if sentence.place:
        column, row = PLACES[sentence.place]
        return bool(np.hypot(present[0].x - CELL[column], present[0].y - CELL[row]) <= PLACE_TOLERANCE)
    if sentence.relation is None:
        return True
    dx, dy = present[1].x - present[0].x, present[1].y - present[0].y
    along, across = (dx, dy) if sentence.relation in ("left of", "right of") else (dy, dx)
    if sentence.relation in ("right of", "below"):
        along = -along
    return along > RELATION_DISTANCE and abs(across) < along
