"""Prompts of the shapes grammar to calibrate with and to try on."""

from __future__ import annotations

import numpy as np

from ldm_calibration.shapes.grammar import held_out_prompts, is_held_out, random_sentence

_SEED = 8


def calibration_prompts(count: int) -> tuple[str, ...]:
    """Random sentences, three in four of two objects, none of them held out."""
    rng, found = np.random.default_rng(_SEED), list[str]()
    while len(found) < count:
        sentence = random_sentence(rng)
        if not is_held_out(sentence):
            found.append(str(sentence))
    return tuple(found)


def trial_prompts(count: int) -> tuple[str, ...]:
    """Held-out sentences, a third of them of one object."""
    return tuple(held_out_prompts(count // 3, count - count // 3, seed=_SEED))
