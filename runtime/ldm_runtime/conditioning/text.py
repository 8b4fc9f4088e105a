"""Text conditioning: tokenizes prompts and runs the text encoder, with a cache of the latest prompts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.tokenizer import Tokenizer
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.number_checks import integer, shown
from ldm_runtime.request import Request
from ldm_runtime.specs import Axis

__all__ = ["CACHE_SIZE", "INPUT_IDS", "SKIPPED", "ZEROS", "TextConditioner", "for_each", "texts_of"]

F32 = NDArray[np.float32]
Outputs = dict[str, F32]
"""Output of a text encoder -> its array for one text, [1, …]."""
CACHE_SIZE = 64
"""Encoded prompts kept for later requests, 0.4 MB each at full size. Most requests share the empty negative prompt."""
MAX_LAYERS = 4096
INPUT_IDS = "input_ids"
"""Input of a text encoder, int64 [N, T]; that of a second one has a number at the end."""
SKIPPED = "skipped_"
"""Prefix of an optional output of a text encoder, float32 [N, layers, T, D]: its states without the last 1, 2, …
layers, e.g. "skipped_context" for the states "context"."""
ZEROS = "zeros_without_negative_prompt"
"""Setting: 1 if the unconditional branch of a request without negative prompt has states of zeros."""


class TextConditioner:
    """Encodes prompts to hidden states of a text encoder, and to a pooled state if the model uses it.

    Args:
        tokenizer: Prompts -> ids int64 [N, T].
        backend: The text encoder: ids int64 [N, T] -> ``outputs`` and, if it has this output, the first of them with
            the prefix ``SKIPPED``.
        outputs: Names of the encoder's output tensors that are inputs of other components: hidden states float32
            [N, T, D] and, optionally, pooled states float32 [N, D].
        zeros: The unconditional branch of a request without negative prompt has outputs of zeros.
    """

    kind: ClassVar[str] = "text"
    fields: ClassVar[frozenset[str]] = frozenset({"prompts", "negative_prompt", "images_per_prompt", "clip_skip"})

    def __init__(
        self, tokenizer: Tokenizer, backend: Backend, outputs: Sequence[str] = ("context",), zeros: bool = False
    ):
        self.tokenizer = tokenizer
        self._backend, self._outputs, self._zeros = backend, tuple(outputs), zeros
        self._input = backend.inputs[0].name
        self._skipped = f"{SKIPPED}{outputs[0]}"
        layers = [tensor.shape[1] for tensor in backend.outputs if tensor.name == self._skipped]
        self._skippable = layers[0] if layers and isinstance(layers[0], int) else 0
        self._states: OrderedDict[tuple[str, int], Outputs] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]) -> Self:
        """Construct from a manifest entry with the file role "tokenizer".

        Raises:
            ManifestError: The tokenizer or the text encoder is missing or of another form.
        """
        if "tokenizer" not in spec.files or spec.component not in backends or len(spec.inputs) not in (1, 2):
            raise ManifestError(f"conditioning: {cls.kind}: got {spec}, expected a tokenizer and a text encoder")
        backend = backends[spec.component]
        got = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in backend.inputs]
        ids = len(got) == 1 and got[0][0].startswith(INPUT_IDS) and got[0][1:] == ("int64", 2)
        tokens = backend.inputs[0].shape[-1] if ids else None
        if not isinstance(tokens, int) or isinstance(tokens, Axis):
            raise ManifestError(f"{spec.component}: inputs are {got}, expected input_ids int64 [N, T]; rebuild it")
        shapes = {tensor.name: tensor.shape for tensor in backend.outputs}
        ranks = [len(shapes.get(name, ())) for name in spec.inputs]
        if ranks not in ([3], [3, 2]) or len(shapes.get(f"{SKIPPED}{spec.inputs[0]}", (0,) * 4)) != 4:
            raise ManifestError(
                f"{spec.component}: outputs are {shapes}, expected {', '.join(spec.inputs)}; rebuild it"
            )
        tokenizer = Tokenizer.from_file(files(spec.files["tokenizer"]), tokens)
        return cls(tokenizer, backend, spec.inputs, bool(spec.settings.get(ZEROS)))

    def prompts(self, request: Request) -> tuple[str, ...]:
        """Texts of the conditional branch, one for each prompt of the request.

        Raises:
            SpecError: There are none, or they are no texts.
        """
        if request.prompts is None:
            raise SpecError("prompts: got none, expected a text or a list of texts; this model draws from text")
        prompts = texts_of("prompts", request.prompts)
        if not prompts:
            raise SpecError("prompts: got an empty list, expected a text or a list of texts")
        return prompts

    def negative_prompts(self, request: Request) -> tuple[str, ...]:
        """Texts of the unconditional branch, one for each prompt of the request.

        Raises:
            SpecError: They are no texts, or another number than there are prompts.
        """
        negative = request.negative_prompt
        return for_each(
            self.prompts(request), "negative_prompt", texts_of("negative_prompt", "" if negative is None else negative)
        )

    def images(self, request: Request) -> int:
        """Check the prompts; one image for each, times ``images_per_prompt``.

        Raises:
            SpecError: No prompts, another number of negative prompts, or more layers to skip than there are.
        """
        prompts = self.prompts(request)
        self.negative_prompts(request)
        if (skip := integer("clip_skip", request.clip_skip, 0, MAX_LAYERS)) > self._skippable:
            raise SpecError(f"clip_skip: got {skip}, but this text encoder can skip {self._skippable} layers")
        return len(prompts) * request.repeats()

    def size(self, request: Request) -> tuple[int, int] | None:
        """None: the request decides the size."""
        return None

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Outputs of the encoder, [images, …]; the "unconditional" branch is that of the negative prompts.

        Raises:
            SpecError: A text cannot be tokenized.
            BackendError: The engine failed.
        """
        texts, skip = self.prompts(request), request.clip_skip
        if branch == "unconditional":
            if self._zeros and request.negative_prompt is None:
                return self._zero_rows(len(texts) * request.images_per_prompt)
            texts, skip = self.negative_prompts(request), 0
        states = self.encode(list(dict.fromkeys(texts)), skip)
        return {
            name: np.concatenate([states[text][name] for text in texts for _ in range(request.images_per_prompt)])
            for name in self._outputs
        }

    def _zero_rows(self, images: int) -> dict[str, NDArray[Any]]:
        shapes = {tensor.name: tensor.bounds("opt")[1:] for tensor in self._backend.outputs}
        return {name: np.zeros((images, *shapes[name]), np.float32) for name in self._outputs}

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def example(self) -> dict[str, Any]:
        """A one-letter prompt."""
        return {"prompts": "a"}

    def encode(self, texts: Sequence[str], skip: int = 0) -> dict[str, Outputs]:
        """Text -> outputs of the encoder, [1, …].

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
                    states[text] = self._encoded(text, skip)
                self._states[text, skip] = states[text]
                self._states.move_to_end((text, skip))
            while len(self._states) > CACHE_SIZE:
                self._states.popitem(last=False)
            return states

    def _encoded(self, text: str, skip: int) -> Outputs:
        outputs = self._backend.run({self._input: self.tokenizer([text])})
        kept = {name: outputs[name] for name in self._outputs}
        return {**kept, self._outputs[0]: outputs[self._skipped][:, skip - 1].copy()} if skip else kept

    def close(self) -> None:
        """Free the text encoder; encoded prompts stay."""
        self._backend.close()


def texts_of(name: str, value: Any) -> tuple[str, ...]:
    """One text or several of the field ``name``, as a tuple.

    Raises:
        SpecError: The value is neither.
    """
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise SpecError(f"{name}: got {shown(value)}, expected a text or a list of texts")
    return tuple(texts)


def for_each(prompts: Sequence[str], name: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Texts of the field ``name``, one for each of the prompts; a single text is for all.

    Raises:
        SpecError: There is another number of texts.
    """
    if len(texts) not in (1, len(prompts)):
        raise SpecError(f"{name}: got {len(texts)} for {len(prompts)} prompts, expected one, or one each")
    return texts * (len(prompts) // len(texts))
