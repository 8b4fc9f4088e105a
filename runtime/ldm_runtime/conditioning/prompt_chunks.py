"""Long and weighted prompts: a prompt is encoded in several chunks, and the hidden states of its tokens are weighted.

The arithmetic is that of the package compel 2.5. A chunk ends after the last sentence that ends in it, else after a
comma, semicolon or colon, else after a word. A weight above 1 moves the states of its tokens away from those of the
empty prompt, a weight below 1 towards them. A weight below 1 also blends the states with those of the prompt in which
the fragment is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.conditioning.tokenizer import Tokenizer

__all__ = ["Layout", "arrange", "weighted_states"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
Encode = Callable[[I64, I64], F32]
"""Ids and attention mask [1, T] -> hidden states [1, T, D]."""
_SPLITS = ((".</w>",), (".</w>", ",</w>", ";</w>", ":</w>"))
_LEAST = 1e-5
"""Smallest weight in the formula, which is not defined for 0."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Tokens of a prompt in chunks; a chunk is one input of the text encoder.

    Attributes:
        ids: int64 [chunks, T].
        weights: Weight of each token, float32 [chunks, T].
        faded: First and last position and weight of each fragment with a weight below 1; positions count over all
            chunks.
        tokens: Number of the prompt's tokens that are in ``ids``.
        cut: Number of tokens that did not fit.
    """

    ids: I64
    weights: F32
    faded: tuple[tuple[int, int, float], ...]
    tokens: int
    cut: int


def arrange(fragments: Sequence[tuple[Sequence[int], float]], tokenizer: Tokenizer, most: int) -> Layout:
    """Put the tokens of weighted fragments into at most ``most`` chunks; the last tokens are cut off."""
    rest = [(token, number) for number, (ids, _) in enumerate(fragments) for token in ids]
    first, last = tokenizer.ends
    room = tokenizer.length - 2
    ids = np.full((0, tokenizer.length), tokenizer.pad_id, np.int64)
    owners = np.full(ids.shape, -1)
    while len(ids) < most and (rest or not len(ids)):
        split = _split(tokenizer, [token for token, _ in rest], room) if most > 1 else room
        part, rest = rest[:split], rest[split:]
        ids = np.pad(ids, ((0, 1), (0, 0)), constant_values=tokenizer.pad_id)
        owners = np.pad(owners, ((0, 1), (0, 0)), constant_values=-1)
        ids[-1, : len(part) + 2] = [first, *(token for token, _ in part), last]
        owners[-1, 1 : len(part) + 1] = [number for _, number in part]
    weights = np.ones(ids.shape, np.float32)
    cut_off = {number for _, number in rest}
    faded = []
    for number, (_, weight) in enumerate(fragments):
        weights[owners == number] = weight
        places = np.flatnonzero(owners == number)
        if weight < 1 and len(places):
            end = owners.size - 1 if number in cut_off else int(places[-1])
            faded.append((int(places[0]), end, weight))
    return Layout(ids, weights, tuple(faded), int((owners >= 0).sum()), len(rest))


def _split(tokenizer: Tokenizer, tokens: Sequence[int], room: int) -> int:
    """Number of tokens of the next chunk."""
    if len(tokens) <= room:
        return len(tokens)
    texts = [tokenizer.token(token) for token in tokens[:room]]
    for ends in _SPLITS:
        if places := [index for index, text in enumerate(texts) if text in ends]:
            return places[-1] + 1
    words = [index for index, text in enumerate(texts) if text.endswith("</w>")]
    return words[-1] + 1 if words else room


def weighted_states(layout: Layout, encode: Encode, empty: F32) -> F32:
    """Hidden states float32 [1, chunks * T, D] of a prompt.

    Args:
        layout: The result of ``arrange``.
        encode: Runs the text encoder on one chunk.
        empty: States of the empty prompt, [1, T, D].
    """

    def encoded(mask: I64) -> F32:
        parts = []
        for ids, weights, own in zip(layout.ids, layout.weights, mask, strict=True):
            states = encode(ids[None], own[None])
            scale = weights[None, :, None]
            parts.append(np.where(scale == 1, states, empty + (states - empty) * scale))
        return np.concatenate(parts, axis=1)

    ones = np.ones_like(layout.ids)
    states, shares = [encoded(ones)], [1.0]
    for start, end, weight in layout.faded:
        mask = ones.copy()
        mask.ravel()[start : end + 1] = 0
        if len(mask) > 1:  # the first and the last token of each chunk
            mask[:, [0, -1]] = 1
        states.append(encoded(mask))
        shares.append(math.tan((1 - max(_LEAST, weight)) * math.pi / 2))
    factors = np.array(shares, np.float32)
    factors /= factors.sum()
    blended: F32 = np.sum([factor * one for factor, one in zip(factors, states, strict=True)], axis=0, dtype=np.float32)
    return blended
