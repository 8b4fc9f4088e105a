"""Text encoder: converts prompts to hidden states and caches those of the latest prompts."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.prompt_chunks import Layout, arrange, weighted_states
from ldm_runtime.conditioning.prompt_weights import weighted_fragments
from ldm_runtime.conditioning.tokenizer import Tokenizer

__all__ = ["ATTENTION_MASK", "CACHE_SIZE", "INPUT_IDS", "SKIPPED", "Outputs", "Reading", "TextEncoder"]

log = logging.getLogger(__name__)
F32 = NDArray[np.float32]
Outputs = dict[str, F32]
"""Output of a text encoder -> its array for one text, [1, …]."""
CACHE_SIZE = 64
"""Maximum number of cached prompts; at full size, 77 tokens take 0.4 MB. Most requests share the empty negative
prompt."""
INPUT_IDS = "input_ids"
"""Token ids, the input of a text encoder: int64 [N, T]. The name of a second encoder's input ends with a number."""
ATTENTION_MASK = "attention_mask"
"""Optional second input of a text encoder, int64 [N, T]: 1 for tokens that are attended to, else 0."""
SKIPPED = "skipped_"
"""Prefix of an optional output of a text encoder, float32 [N, layers, T, D]: the hidden states if the last 1, 2, …
layers are skipped, e.g. "skipped_context" for the output "context"."""


class Reading(NamedTuple):
    """A text with the options that its hidden states depend on; the key of the cache.

    Attributes:
        text: The text.
        skip: Number of last layers of the encoder to skip, at most ``layers`` of ``SKIPPED``.
        chunks: Number of encoder inputs that the text is spread over; its hidden states are [1, chunks * T, D].
        weighted: True if weights in the text are read; see ``prompt_weights``.
    """

    text: str
    skip: int = 0
    chunks: int = 1
    weighted: bool = False


class TextEncoder:
    """Encodes texts one at a time, so that the result of a text does not depend on other texts of the same call.

    Args:
        tokenizer: Prompts -> ids int64 [N, T].
        backend: The text encoder: ids and optionally ``ATTENTION_MASK``, int64 [N, T] -> ``outputs`` and optionally the
            first of them with the prefix ``SKIPPED``. Texts in chunks or with weights need the mask.
        outputs: See ``TextConditioner``.

    Attributes:
        skippable: Number of last layers that can be skipped.
        masked: True if the encoder takes a mask.
    """

    def __init__(self, tokenizer: Tokenizer, backend: Backend, outputs: Sequence[str]):
        self._tokenizer, self._backend, self._outputs = tokenizer, backend, tuple(outputs)
        self._input, *masks = (tensor.name for tensor in backend.inputs)
        self._mask = masks[0] if masks else None
        self._skipped = f"{SKIPPED}{outputs[0]}"
        layers = [tensor.shape[1] for tensor in backend.outputs if tensor.name == self._skipped]
        self.skippable = layers[0] if layers and isinstance(layers[0], int) else 0
        self.masked = bool(masks)
        self._states: OrderedDict[Reading, Outputs] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, readings: Sequence[Reading]) -> list[Outputs]:
        """Outputs of the encoder for each text, [1, …].

        Raises:
            SpecError: A text cannot be tokenized, or its weights cannot be read.
            BackendError: The engine failed.
        """
        results = []
        with self._lock:
            for reading in readings:
                if reading not in self._states:
                    self._states[reading] = self._encoded(reading)
                self._states.move_to_end(reading)
                results.append(self._states[reading])
            while len(self._states) > CACHE_SIZE:
                self._states.popitem(last=False)
        return results

    def layout(self, reading: Reading) -> Layout:
        """Arrange the tokens of a text in at most ``reading.chunks`` chunks.

        Raises:
            SpecError: As ``encode``.
        """
        fragments = weighted_fragments(reading.text) if reading.weighted else ((reading.text, 1.0),)
        ids = [(self._tokenizer.ids(part), weight) for part, weight in fragments]
        return arrange(ids, self._tokenizer, reading.chunks)

    def zeros(self, texts: int, chunks: int) -> Outputs:
        """Return outputs that are all zero for a number of texts."""
        shapes = {tensor.name: tensor.bounds("opt")[1:] for tensor in self._backend.outputs}
        tokens, width = shapes[self._outputs[0]]
        shapes[self._outputs[0]] = tokens * chunks, width
        return {name: np.zeros((texts, *shapes[name]), np.float32) for name in self._outputs}

    def _encoded(self, reading: Reading) -> Outputs:
        """Outputs for one text. As in compel, its pooled states come from the tokens that fit into one chunk."""
        if reading.chunks == 1 and not reading.weighted:
            return self._run(self._tokenizer([reading.text]), reading.skip)
        layout, hidden = self.layout(reading), self._outputs[0]
        if layout.cut:
            log.warning(
                "prompt: only %d of its %d tokens are used; shorten it, or set prompt_chunks to more than %d",
                layout.tokens,
                layout.tokens + layout.cut,
                len(layout.ids),
            )

        def states(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> F32:
            return self._run(ids, reading.skip, mask)[hidden]

        empty = self._run(arrange((), self._tokenizer, 1).ids, reading.skip)[hidden]
        padding = [empty] * (reading.chunks - len(layout.ids))
        context = np.concatenate([weighted_states(layout, states, empty), *padding], axis=1)
        if len(self._outputs) == 1:
            return {hidden: context}
        start = arrange([(self._tokenizer.ids(reading.text), 1.0)], self._tokenizer, 1).ids
        return {**self._run(start, 0), hidden: context}

    def _run(self, ids: NDArray[np.int64], skip: int, mask: NDArray[np.int64] | None = None) -> Outputs:
        feed = {self._input: ids}
        if self._mask is not None:
            feed[self._mask] = np.ones_like(ids) if mask is None else mask
        outputs = self._backend.run(feed)
        kept = {name: outputs[name] for name in self._outputs}
        return {**kept, self._outputs[0]: outputs[self._skipped][:, skip - 1].copy()} if skip else kept

    def close(self) -> None:
        """Free the engine; encoded prompts stay in the cache."""
        self._backend.close()
