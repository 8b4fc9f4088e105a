"""The grammar of the demo model's prompts: sentences that describe 64×64 images of one or two coloured shapes.

    sentence  = object [place] [ground] | object relation object [ground]
    object    = "a" [size] colour shape
    place     = "in the center" | "at the top left" | … (nine in all)
    relation  = "left of" | "right of" | "above" | "below"
    ground    = "on a" background "background"

A description always names colour and shape; size, place and background may be left open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "PLACES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Sentence",
    "Thing",
    "calibration_prompts",
    "held_out_prompts",
    "is_held_out",
    "one_object_sentences",
    "parse",
    "random_sentence",
    "trial_prompts",
    "two_object_sentences",
]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "gray", "black", "yellow")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = {
    "in the center": (1, 1),
    "at the top left": (0, 0),
    "at the top": (1, 0),
    "at the top right": (2, 0),
    "at the left": (0, 1),
    "at the right": (2, 1),
    "at the bottom left": (0, 2),
    "at the bottom": (1, 2),
    "at the bottom right": (2, 2),
}
"""Place phrase to (column, row) on a 3×3 grid."""
_SEED = 8


@dataclass(frozen=True)
class Thing:
    """One described object; ``size`` is None if the sentence leaves it open."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Sentence:
    """Content of a prompt: one thing with a place, or two things with a relation, and a background."""

    things: tuple[Thing, ...]
    place: str | None = None
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        text = f" {self.relation} ".join(str(thing) for thing in self.things)
        if self.place:
            text += f" {self.place}"
        return f"{text} on a {self.background} background" if self.background else text


def parse(text: str) -> Sentence:
    """Read a sentence of the grammar back into its parts.

    Raises:
        ValueError: The text is not a sentence of the grammar.
    """
    rest = " ".join(text.lower().split())
    background = place = relation = None
    if rest.endswith(" background"):
        rest, _, tail = rest.rpartition(" on a ")
        background = tail.removesuffix(" background")
        if background not in BACKGROUNDS:
            raise ValueError(f"background {background!r} is none of {', '.join(BACKGROUNDS)}: {text!r}")
    for phrase in sorted(PLACES, key=len, reverse=True):
        if rest.endswith(f" {phrase}"):
            rest, place = rest.removesuffix(f" {phrase}"), phrase
            break
    parts = [rest]
    for phrase in RELATIONS:
        if f" {phrase} " in rest:
            parts, relation = rest.split(f" {phrase} "), phrase
            break
    if len(parts) > 2 or (relation and place):
        raise ValueError(f"not a sentence of the shapes grammar: {text!r}")
    return Sentence(tuple(_thing(part, text) for part in parts), place, relation, background)


def _thing(part: str, text: str) -> Thing:
    words = part.split()
    if words[:1] in (["a"], ["an"]):
        words = words[1:]
    size = words.pop(0) if words and words[0] in SIZES else None
    if len(words) != 2 or words[0] not in COLOURS or words[1] not in SHAPES:
        raise ValueError(f"{part!r} is not '[size] colour shape' of the shapes grammar: {text!r}")
    return Thing(words[0], words[1], size)


def is_held_out(sentence: Sentence) -> bool:
    """True for the tenth of all full sentences that is excluded from training, selected by SHA-256."""
    return hashlib.sha256(str(sentence).encode()).digest()[0] % 10 == 0


def one_object_sentences() -> Iterator[Sentence]:
    """All full one-object sentences, in a fixed order."""
    for size, colour, shape, place, background in product(SIZES, COLOURS, SHAPES, PLACES, BACKGROUNDS):
        if colour != background:
            yield Sentence((Thing(colour, shape, size),), place=place, background=background)


def two_object_sentences() -> Iterator[Sentence]:
    """All full two-object sentences, in a fixed order."""
    things = [Thing(colour, shape, size) for size, colour, shape in product(SIZES, COLOURS, SHAPES)]
    for first, second, relation, background in product(things, things, RELATIONS, BACKGROUNDS):
        if background not in (first.colour, second.colour):
            yield Sentence((first, second), relation=relation, background=background)


def held_out_prompts(one_object: int, two_object: int, seed: int = 0) -> list[str]:
    """Draw a reproducible sample of held-out prompts, one-object sentences first.

    Raises:
        ValueError: More sentences are requested than are held out.
    """
    rng = np.random.default_rng(seed)
    prompts: list[str] = []
    for count, sentences in ((one_object, one_object_sentences()), (two_object, two_object_sentences())):
        pool = [str(sentence) for sentence in sentences if is_held_out(sentence)]
        if count > len(pool):
            raise ValueError(f"{count} held-out prompts requested, {len(pool)} exist")
        prompts += [pool[i] for i in rng.permutation(len(pool))[:count]]
    return prompts


def random_sentence(rng: np.random.Generator, two_objects: float = 0.75) -> Sentence:
    """Generate a random full sentence; ``two_objects`` is the share of two-object scenes."""

    def pick(names: tuple[str, ...]) -> str:
        return names[rng.integers(len(names))]

    count = 2 if rng.random() < two_objects else 1
    things = tuple(Thing(pick(COLOURS), pick(SHAPES), pick(SIZES)) for _ in range(count))
    colours = {thing.colour for thing in things}
    background = pick(tuple(name for name in BACKGROUNDS if name not in colours))
    if count == 2:
        return Sentence(things, relation=pick(RELATIONS), background=background)
    return Sentence(things, place=pick(tuple(PLACES)), background=background)


def calibration_prompts(count: int) -> tuple[str, ...]:
    """Random full sentences that are not held out, reproducible; three quarters of them describe two objects.

    Args:
        count: Number of prompts.
    """
    rng, prompts = np.random.default_rng(_SEED), list[str]()
    while len(prompts) < count:
        sentence = random_sentence(rng)
        if not is_held_out(sentence):
            prompts.append(str(sentence))
    return tuple(prompts)


def trial_prompts(count: int) -> tuple[str, ...]:
    """Held-out sentences, reproducible; one third of them describes one object.

    Args:
        count: Number of prompts.

    Raises:
        ValueError: More prompts are requested than sentences are held out.
    """
    return tuple(held_out_prompts(count // 3, count - count // 3, seed=_SEED))
