"""Batches of the shapes domain for training: pictures, sentences and their tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ldm_calibration.shapes.drawing import arrange, draw
from ldm_calibration.shapes.grammar import Sentence, is_held_out, random_sentence


def training_sentence(rng: np.random.Generator) -> Sentence:
    """A random full sentence that is not held out."""
    while is_held_out(sentence := random_sentence(rng)):
        pass
    return sentence


def pictures(seed: int, index: int, count: int) -> tuple[torch.Tensor, list[Sentence]]:
    """Batch ``index`` of a seed's stream: float32 [count, 3, 64, 64] in [-1, 1] and the full sentences."""
    rng = np.random.default_rng([seed, index])
    sentences = [training_sentence(rng) for _ in range(count)]
    pixels = np.stack([draw(arrange(sentence, rng)) for sentence in sentences])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, sentences


def loosen(sentence: Sentence, rng: np.random.Generator, share: float = 0.1) -> Sentence:
    """The sentence with each part that may be left open left open with probability ``share``."""
    things = tuple(replace(thing, size=None) if rng.random() < share else thing for thing in sentence.things)
    place = None if rng.random() < share else sentence.place
    background = None if rng.random() < share else sentence.background
    return Sentence(things, place, sentence.relation, background)
