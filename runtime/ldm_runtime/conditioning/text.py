"""TextConditioner as the UNet takes them, each encoded once: of many requests most share the empty text of guidance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.tokenizer import Tokenizer

F32 = NDArray[np.float32]
MOST = 64
"""Encoded texts kept for later requests: 0.4 MB each at full size."""


class TextConditioner:
    """Encodes texts with a tokenizer and a backend that takes ``input_ids``; keeps the latest MOST."""

    def __init__(self, tokenizer: Tokenizer, backend: Backend):
        self._tokenizer, self._backend = tokenizer, backend
        self._states: OrderedDict[str, F32] = OrderedDict()

    def encode(self, texts: Sequence[str]) -> dict[str, F32]:
        """Text → hidden states float32 [1, T, D].

        Each text is encoded alone, so its states do not depend on what it comes with.

        Raises:
            SpecError: a text cannot be tokenized.
            BackendError: the engine failed.
        """
        found = {text: self._states[text] for text in texts if text in self._states}
        for text in texts:
            if text not in found:
                found[text] = self._backend.run({"input_ids": self._tokenizer([text])})["context"]
            self._states[text] = found[text]
            self._states.move_to_end(text)
        while len(self._states) > MOST:
            self._states.popitem(last=False)
        return found
