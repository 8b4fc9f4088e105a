"""Text conditioning: tokenizes prompts and runs the text encoder, with a cache of the latest prompts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.tokenizer import Tokenizer
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.number_checks import integer, shown
from ldm_runtime.request import Request
from ldm_runtime.specs import Axis

__all__ = ["CACHE_SIZE", "SKIPPED", "TextConditioner"]

F32 = NDArray[np.float32]
CACHE_SIZE = 64
"""Encoded prompts kept for later requests, 0.4 MB each at full size. Most requests share the empty negative prompt."""
MAX_LAYERS = 4096
SKIPPED = "skipped_context"
"""Optional output of a text encoder, float32 [N, layers, T, D]: its states without the last 1, 2, … layers."""


class TextConditioner:
    """Encodes prompts to hidden states of a text encoder.

    Args:
        tokenizer: Prompts -> ids int64 [N, T].
        backend: The text encoder: ``input_ids`` int64 [N, T] -> ``output`` float32 [N, T, D], and ``SKIPPED`` if it
            has that output.
        output: Name of the encoder's output tensor, which is the UNet's input.
        skippable: Layers that ``SKIPPED`` has; 0 without this output.
    """

    kind: ClassVar[str] = "text"
    fields: ClassVar[frozenset[str]] = frozenset({"prompts", "negative_prompt", "images_per_prompt", "clip_skip"})

    def __init__(self, tokenizer: Tokenizer, backend: Backend, output: str = "context", skippable: int = 0):
        self.tokenizer = tokenizer
        self._backend, self._output, self._skippable = backend, output, skippable
        self._states: OrderedDict[tuple[str, int], F32] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> TextConditioner:
        """Construct from a manifest entry with the file role "tokenizer".

        Raises:
            ManifestError: The tokenizer or the text encoder is missing or of another form.
        """
        if "tokenizer" not in spec.files or spec.component not in backends or len(spec.inputs) != 1:
            raise ManifestError(f"conditioning: text: got {spec}, expected a tokenizer and a text encoder; rebuild it")
        backend = backends[spec.component]
        got = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in backend.inputs]
        tokens = backend.inputs[0].shape[-1] if got == [("input_ids", "int64", 2)] else None
        if not isinstance(tokens, int) or isinstance(tokens, Axis):
            raise ManifestError(f"{spec.component}: inputs are {got}, expected input_ids int64 [N, T]; rebuild it")
        skipped = [tensor.shape[1] for tensor in backend.outputs if tensor.name == SKIPPED and len(tensor.shape) == 4]
        layers = skipped[0] if skipped and isinstance(skipped[0], int) else 0
        return cls(Tokenizer.from_file(files(spec.files["tokenizer"]), tokens), backend, spec.inputs[0], layers)

    def images(self, request: Request) -> int:
        """Check the prompts; one image for each, times ``images_per_prompt``.

        Raises:
            SpecError: No prompts, another number of negative prompts, or more layers to skip than there are.
        """
        if request.prompts is None:
            raise SpecError("prompts: got none, expected a text or a list of texts; this model draws from text")
        prompts = _texts("prompts", request.prompts)
        if not prompts:
            raise SpecError("prompts: got an empty list, expected a text or a list of texts")
        negative = _texts("negative_prompt", request.negative_prompt)
        if len(negative) not in (1, len(prompts)):
            raise SpecError(
                f"negative_prompt: got {len(negative)} for {len(prompts)} prompts, expected one, or one each"
            )
        if (skip := integer("clip_skip", request.clip_skip, 0, MAX_LAYERS)) > self._skippable:
            raise SpecError(f"clip_skip: got {skip}, but this text encoder can skip {self._skippable} layers")
        return len(prompts) * request.repeats()

    def size(self, request: Request) -> tuple[int, int] | None:
        """None: the request decides the size."""
        return None

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Hidden states float32 [images, T, D]; the "unconditional" branch is that of the negative prompts.

        Raises:
            SpecError: A text cannot be tokenized.
            BackendError: The engine failed.
        """
        prompts = _texts("prompts", request.prompts)
        texts, skip = prompts, request.clip_skip
        if branch == "unconditional":
            negative = _texts("negative_prompt", request.negative_prompt)
            texts, skip = negative * (len(prompts) // len(negative)), 0
        states = self.encode(list(dict.fromkeys(texts)), skip)
        return {
            self._output: np.concatenate([states[text] for text in texts for _ in range(request.images_per_prompt)])
        }

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def example(self) -> dict[str, Any]:
        """A one-letter prompt."""
        return {"prompts": "a"}

    def encode(self, texts: Sequence[str], skip: int = 0) -> dict[str, F32]:
        """Text -> hidden states float32 [1, T, D].

        Each text is encoded alone, so its states do not depend on the others of a call.

        Args:
            texts: The texts.
            skip: Last layers of the encoder that are skipped, at most those of ``SKIPPED``.

        Raises:
            SpecError: A text cannot be tokenized.
            BackendError: The engine failed.
        """
        with self._lock:
            states = {text: self._states[text, skip] for text in texts if (text, skip) in self._states}
            for text in texts:
                if text not in states:
                    outputs = self._backend.run({"input_ids": self.tokenizer([text])})
                    states[text] = outputs[SKIPPED][:, skip - 1].copy() if skip else outputs[self._output]
                self._states[text, skip] = states[text]
                self._states.move_to_end((text, skip))
            while len(self._states) > CACHE_SIZE:
                self._states.popitem(last=False)
            return states

    def close(self) -> None:
        """Free the text encoder; encoded prompts stay."""
        self._backend.close()


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise SpecError(f"{name}: got {shown(value)}, expected a text or a list of texts")
    return tuple(texts)
