"""Training batches of the demo model: images and their sentences."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import torch

from ldm_export_demo.drawing import Figure, Scene, arrange, draw
from ldm_export_demo.grammar import BACKGROUNDS, COLOURS, SHAPES, Sentence, is_held_out, random_sentence
from ldm_export_demo.inputs import figure_mask, rectangle_mask


def training_sentence(rng: np.random.Generator) -> Sentence:
    """Generate a random full sentence that is not held out."""
    while is_held_out(sentence := random_sentence(rng)):
        pass
    return sentence


def crowded_images(seed: int, index: int, count: int) -> torch.Tensor:
    """Images with one shape in each quarter, which have more edges: float32 [count, 3, 64, 64] in [-1, 1]."""
    rng = np.random.default_rng([seed, index, 4])
    return _normalised([draw(_crowd(rng)) for _ in range(count)])


def _crowd(rng: np.random.Generator) -> Scene:
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    colours = [name for name in COLOURS if name != background]
    figures = []
    for row, column in product((16, 48), repeat=2):
        radius = rng.uniform(7, 13)
        x, y = (centre + rng.uniform(radius - 15, 15 - radius) for centre in (column, row))
        figures.append(Figure(colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))], radius, x, y))
    return Scene(background, tuple(figures))


def _normalised(pixels: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def scene_images(seed: int, index: int, count: int) -> tuple[torch.Tensor, list[Sentence]]:
    """Batch ``index`` of a seed: images float32 [count, 3, 64, 64] in [-1, 1], and their full sentences."""
    rng = np.random.default_rng([seed, index])
    sentences = [training_sentence(rng) for _ in range(count)]
    return _normalised([draw(arrange(sentence, rng)) for sentence in sentences]), sentences


def masked_scenes(seed: int, index: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batch ``index`` of a seed: images as in ``scene_images``, and masks float32 [count, 1, 64, 64], 1 where redrawn.

    The third tensor, bool [count], is true where the mask hides a whole object.

    Seven in ten masks hide a part of an object, two in ten a whole one, and one in ten is anywhere.
    """
    rng = np.random.default_rng([seed, index, 6])
    pixels, masks, whole = [], [], []
    for _ in range(count):
        scene = arrange(training_sentence(rng), rng)
        figure, chance = scene.figures[rng.integers(len(scene.figures))], rng.random()
        kind = "part" if chance < 0.7 else "object"
        whole.append(0.7 <= chance < 0.9)
        pixels.append(draw(scene))
        masks.append(rectangle_mask(rng) if chance >= 0.9 else figure_mask(figure, kind, rng))
    return _normalised(pixels), torch.from_numpy(np.stack(masks))[:, None].float() / 255, torch.tensor(whole)


def loosen(sentence: Sentence, rng: np.random.Generator, share: float = 0.1) -> Sentence:
    """Leave each optional part of a sentence open with probability ``share``."""
    things = tuple(replace(thing, size=None) if rng.random() < share else thing for thing in sentence.things)
    place = None if rng.random() < share else sentence.place
    background = None if rng.random() < share else sentence.background
    return Sentence(things, place, sentence.relation, background)
