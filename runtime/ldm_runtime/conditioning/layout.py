"""Layout conditioning: object boxes, or their tokens, encoded by a component."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.layout_tokens import LayoutVocabulary
from ldm_runtime.errors import LdmError, ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.number_checks import shown
from ldm_runtime.regular_files import read_regular
from ldm_runtime.request import Request

__all__ = ["LayoutConditioner", "read_categories"]

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
MAX_BYTES = 2**20
"""Largest file of category names."""


class LayoutConditioner:
    """Encodes layouts of objects.

    Args:
        backend: The encoder: ``tokens`` int64 [N, T] -> ``output`` float32 [N, T, D].
        output: Name of the encoder's output tensor, which is the UNet's input.
        vocabulary: Converts boxes to tokens.
    """

    kind: ClassVar[str] = "layout"
    fields: ClassVar[frozenset[str]] = frozenset({"tokens", "layout", "images_per_prompt"})

    def __init__(self, backend: Backend, output: str, vocabulary: LayoutVocabulary):
        self._backend, self._output, self.vocabulary = backend, output, vocabulary

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> LayoutConditioner:
        """Construct from a manifest entry with the setting "vocabulary" and, optionally, the file role "categories".

        Raises:
            ManifestError: The encoder, the setting or the file is missing or of another form.
        """
        vocabulary = spec.settings.get("vocabulary", 0)
        if spec.component not in backends or len(spec.inputs) != 1 or vocabulary < 4:
            raise ManifestError(f"conditioning: layout: got {spec}, expected an encoder and a vocabulary; rebuild it")
        backend = backends[spec.component]
        got = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in backend.inputs]
        tokens = backend.inputs[0].shape[-1] if got == [("tokens", "int64", 2)] else None
        if not isinstance(tokens, int) or tokens < 5 or tokens % 3 != 2:
            raise ManifestError(f"{spec.component}: inputs are {got}, expected tokens int64 [N, 3 n + 2]; rebuild it")
        categories: Sequence[str] = ()
        if "categories" in spec.files:
            categories = read_categories(files(spec.files["categories"]), ManifestError)
        return cls(backend, spec.inputs[0], LayoutVocabulary(tokens, vocabulary, categories))

    def images(self, request: Request) -> int:
        """Check tokens or boxes; one image for each layout, times ``images_per_prompt``.

        Raises:
            SpecError: Neither or both are given, or one of them cannot be used.
        """
        return len(self._tokens(request)) * request.repeats()

    def size(self, request: Request) -> tuple[int, int] | None:
        """None: the request decides the size."""
        return None

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Encoded layouts float32 [images, T, D], the same for every branch.

        Raises:
            BackendError: The engine failed.
        """
        tokens = self._tokens(request)
        found = [self._backend.run({"tokens": tokens[i : i + 1]})[self._output] for i in range(len(tokens))]
        return {self._output: np.repeat(np.concatenate(found), request.images_per_prompt, axis=0)}

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def example(self) -> dict[str, Any]:
        """One object of the first category in the middle."""
        return {"tokens": self.vocabulary.encode([(0, (0.25, 0.25, 0.5, 0.5))])}

    def close(self) -> None:
        """Free the encoder."""
        self._backend.close()

    def _tokens(self, request: Request) -> I64:
        """Tokens int64 [layouts, T]."""
        if (request.tokens is None) == (request.layout is None):
            got = "none" if request.tokens is None else "tokens and a layout"
            raise SpecError(
                f"layout: got {got}, expected either a layout of (category, box) pairs or tokens; this model draws "
                "from layouts"
            )
        if request.layout is not None:
            return np.array([self.vocabulary.encode(layout) for layout in _layouts(request.layout)], np.int64)
        try:
            array = np.asarray(request.tokens)
        except ValueError:
            array = np.zeros(0)
        array = array[None] if array.ndim == 1 else array
        count, most = self.vocabulary.tokens, self.vocabulary.vocabulary - 1
        if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[1] != count or not array.size:
            raise SpecError(f"tokens: got {shown(request.tokens)}, expected whole numbers [{count}] or [N, {count}]")
        if array.min() < 0 or array.max() > most:
            wrong = int(array.min() if array.min() < 0 else array.max())
            raise SpecError(f"tokens: got {wrong}, expected 0 to {most}")
        return array.astype(np.int64)


def _layouts(given: Any) -> Sequence[Sequence[Any]]:
    """A list of layouts; a single layout becomes a list of one."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, list | tuple) for one in given):
        raise SpecError(f"layout: got {shown(given)}, expected a list of (category, (x, y, width, height))")
    several = bool(given) and all(isinstance(entry, list | tuple) for one in given for entry in one)
    return given if several else [given]


def read_categories(file: Path, error: type[LdmError]) -> tuple[str, ...]:
    """Read category names from a text file, one per line; the first has the number 0.

    Raises:
        error: The file cannot be read, or it is empty, or has an empty or repeated name.
    """
    try:
        names = tuple(line.strip() for line in read_regular(file, MAX_BYTES, error).decode().splitlines())
    except UnicodeDecodeError as problem:
        raise error(f"{file}: is not UTF-8 (byte {problem.start}), expected one category per line") from None
    seen: set[str] = set()
    for number, name in enumerate(names):
        if not name or name in seen:
            raise error(f"{file}: line {number + 1}: got {shown(name)}, expected a name that no other line has")
        seen.add(name)
    if not names:
        raise error(f"{file}: is empty, expected one category per line")
    return names
