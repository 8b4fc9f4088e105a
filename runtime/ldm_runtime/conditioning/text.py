"""Text conditioning: encodes prompts and negative prompts with a text encoder."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.text_encoder import ATTENTION_MASK, INPUT_IDS, SKIPPED, Reading, TextEncoder
from ldm_runtime.conditioning.tokenizer import Tokenizer
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.number_checks import integer, shown
from ldm_runtime.request import Request
from ldm_runtime.specs import Axis

__all__ = ["ZEROS", "TextConditioner", "for_each", "texts_of"]

F32 = NDArray[np.float32]
MAX_LAYERS = MAX_CHUNKS = 4096
ZEROS = "zeros_without_negative_prompt"
"""Setting: 1 if the unconditional branch uses zeros instead of hidden states when there is no negative prompt."""


class TextConditioner:
    """Encodes prompts to hidden states of a text encoder, and to a pooled state if the model uses it.

    Args:
        tokenizer: Prompts -> ids int64 [N, T].
        backend: The text encoder; see ``TextEncoder``.
        outputs: Names of the encoder's output tensors that are inputs of other components: hidden states float32
            [N, T, D] and, optionally, pooled states float32 [N, D].
        zeros: True if the unconditional branch uses zeros when there is no negative prompt.
        most_chunks: Maximum number of prompt chunks that the model takes.
    """

    kind: ClassVar[str] = "text"
    fields: ClassVar[frozenset[str]] = frozenset(
        {"prompts", "negative_prompt", "images_per_prompt", "clip_skip", "prompt_chunks", "prompt_weights"}
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        backend: Backend,
        outputs: Sequence[str] = ("context",),
        zeros: bool = False,
        most_chunks: int = 1,
    ):
        self._encoder, self._outputs, self._zeros = TextEncoder(tokenizer, backend, outputs), tuple(outputs), zeros
        self._most_chunks = most_chunks if self._encoder.masked else 1

    @classmethod
    def open(cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]) -> Self:
        """Construct from a manifest entry with the file role "tokenizer".

        Raises:
            ManifestError: The tokenizer or the text encoder is missing or of another form.
        """
        if "tokenizer" not in spec.files or spec.component not in backends or len(spec.inputs) not in (1, 2):
            raise ManifestError(f"conditioning: {cls.kind}: got {spec}, expected a tokenizer and a text encoder")
        backend = backends[spec.component]
        inputs, names = backend.inputs, (INPUT_IDS, ATTENTION_MASK)
        fits = len(inputs) in (1, 2) and all(
            tensor.name.startswith(name) and tensor.dtype == "int64" and tensor.shape == inputs[0].shape
            for tensor, name in zip(inputs, names, strict=False)
        )
        tokens = inputs[0].shape[-1] if fits and len(inputs[0].shape) == 2 else None
        if not isinstance(tokens, int):
            got = ", ".join(map(str, inputs))
            raise ManifestError(
                f"{spec.component}: inputs are {got}, expected input_ids int64 [N, T] and at most an attention_mask of "
                "this form; rebuild it"
            )
        shapes = {tensor.name: tensor.shape for tensor in backend.outputs}
        ranks = [len(shapes.get(name, ())) for name in spec.inputs]
        if ranks not in ([3], [3, 2]) or len(shapes.get(f"{SKIPPED}{spec.inputs[0]}", (0,) * 4)) != 4:
            raise ManifestError(
                f"{spec.component}: outputs are {shapes}, expected {', '.join(spec.inputs)}; rebuild it"
            )
        tokenizer = Tokenizer.from_file(files(spec.files["tokenizer"]), tokens)
        taken = [one.shape[1] for user in backends.values() for one in user.inputs if one.name == spec.inputs[0]]
        chunks = min((axis.max if isinstance(axis, Axis) else 1 for axis in taken), default=1)
        return cls(tokenizer, backend, spec.inputs, bool(spec.settings.get(ZEROS)), chunks)

    def prompts(self, request: Request) -> tuple[str, ...]:
        """Texts of the conditional branch, one for each prompt of the request.

        Raises:
            SpecError: There are none, or they are not texts.
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
            SpecError: They are not texts, or their number differs from the number of prompts.
        """
        negative = request.negative_prompt
        return for_each(
            self.prompts(request), "negative_prompt", texts_of("negative_prompt", "" if negative is None else negative)
        )

    def images(self, request: Request) -> int:
        """Check the prompts; one image for each, times ``images_per_prompt``.

        Raises:
            SpecError: There are no prompts, the number of negative prompts differs, there are too many layers to skip
                or too many chunks, or the encoder does not support weights.
        """
        prompts = self.prompts(request)
        self.negative_prompts(request)
        self._check_reading(request)
        if (skip := integer("clip_skip", request.clip_skip, 0, MAX_LAYERS)) > self._encoder.skippable:
            raise SpecError(f"clip_skip: got {skip}, but this text encoder can skip {self._encoder.skippable} layers")
        return len(prompts) * request.repeats()

    def _check_reading(self, request: Request) -> None:
        if not isinstance(request.prompt_weights, bool | np.bool_):
            raise SpecError(f"prompt_weights: got {shown(request.prompt_weights)}, expected True or False")
        wanted = integer("prompt_chunks", request.prompt_chunks, 1, MAX_CHUNKS)
        if (wanted > 1 or request.prompt_weights) and not self._encoder.masked:
            name = "prompt_chunks" if wanted > 1 else "prompt_weights"
            raise SpecError(
                f"{name}: got {getattr(request, name)}, but this bundle's text encoder takes no attention mask; build "
                "a bundle of a Stable Diffusion model with this version"
            )
        if wanted > self._most_chunks:
            raise SpecError(f"prompt_chunks: got {wanted}, but this bundle takes at most {self._most_chunks}")

    def chunks(self, request: Request, branches: Collection[str]) -> int:
        """Number of chunks that the longest prompt of an accepted request needs, at most ``prompt_chunks``.

        Raises:
            SpecError: A text cannot be tokenized, or its weights cannot be read.
        """
        if request.prompt_chunks == 1 and not request.prompt_weights:
            return 1
        texts = [*self.prompts(request), *(self.negative_prompts(request) if "unconditional" in branches else ())]
        readings = [Reading(text, 0, request.prompt_chunks, request.prompt_weights) for text in texts]
        return max(len(self._encoder.layout(reading).ids) for reading in readings)

    def size(self, request: Request) -> tuple[int, int] | None:
        """None: the request decides the size."""
        return None

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Outputs of the encoder, [images, …]; the "unconditional" branch encodes the negative prompts.

        Raises:
            SpecError: A text cannot be tokenized.
            BackendError: The engine failed.
        """
        texts, skip = self.prompts(request), request.clip_skip
        if branch == "unconditional":
            if self._zeros and request.negative_prompt is None:
                return self._encoder.zeros(len(texts) * request.images_per_prompt, request.prompt_chunks)
            texts, skip = self.negative_prompts(request), 0
        readings = [Reading(text, skip, request.prompt_chunks, request.prompt_weights) for text in texts]
        states = self._encoder.encode(readings)
        return {
            name: np.concatenate([one[name] for one in states for _ in range(request.images_per_prompt)])
            for name in self._outputs
        }

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def example(self) -> dict[str, Any]:
        """A one-letter prompt."""
        return {"prompts": "a"}

    def close(self) -> None:
        """Free the text encoder; encoded prompts stay in the cache."""
        self._encoder.close()


def texts_of(name: str, value: Any) -> tuple[str, ...]:
    """Return the text or texts of the field ``name`` as a tuple.

    Raises:
        SpecError: The value is neither.
    """
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise SpecError(f"{name}: got {shown(value)}, expected a text or a list of texts")
    return tuple(texts)


def for_each(prompts: Sequence[str], name: str, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Return one text of the field ``name`` for each prompt; a single text is repeated for all prompts.

    Raises:
        SpecError: There is another number of texts.
    """
    if len(texts) not in (1, len(prompts)):
        raise SpecError(f"{name}: got {len(texts)} for {len(prompts)} prompts, expected one, or one each")
    return texts * (len(prompts) // len(texts))
