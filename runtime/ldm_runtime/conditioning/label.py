"""Label conditioning: class labels, embedded by a component of a class-conditional model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.number_checks import as_integer, integer, shown
from ldm_runtime.request import Request

__all__ = ["LabelConditioner"]

F32 = NDArray[np.float32]


class LabelConditioner:
    """Embeds class labels.

    Args:
        backend: The label encoder: ``label`` int64 [N] -> ``output`` float32 [N, T, D].
        output: Name of the encoder's output tensor, which is the UNet's input.
        classes: Number of classes a request may name.
        unconditional: Label of the unconditional branch.
    """

    kind: ClassVar[str] = "label"
    fields: ClassVar[frozenset[str]] = frozenset({"labels", "images_per_prompt"})

    def __init__(self, backend: Backend, output: str, classes: int, unconditional: int):
        self._backend, self._output = backend, output
        self.classes, self.unconditional = classes, unconditional

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> LabelConditioner:
        """Construct from a manifest entry with the settings "classes" and "unconditional".

        Raises:
            ManifestError: The label encoder is missing or of another form, or a setting is missing.
        """
        settings = {"classes", "unconditional"}
        if spec.component not in backends or len(spec.inputs) != 1 or not settings <= spec.settings.keys():
            raise ManifestError(f"conditioning: label: got {spec}, expected a label encoder, classes and unconditional")
        backend = backends[spec.component]
        got = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in backend.inputs]
        if got != [("label", "int64", 1)]:
            raise ManifestError(f"{spec.component}: inputs are {got}, expected label int64 [N]; rebuild it")
        return cls(backend, spec.inputs[0], spec.settings["classes"], spec.settings["unconditional"])

    def images(self, request: Request) -> int:
        """Check the labels; one image for each, times ``images_per_prompt``.

        Raises:
            SpecError: No labels, or one out of range.
        """
        if request.labels is None:
            raise SpecError(
                f"labels: got none, expected numbers from 0 to {self.classes - 1}; this model draws classes"
            )
        labels = _labels(request.labels)
        for label in labels:
            integer("labels", label, 0, self.classes - 1)
        return len(labels) * request.repeats()

    def size(self, request: Request) -> tuple[int, int] | None:
        """None: the request decides the size."""
        return None

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Embeddings float32 [images, T, D]; all rows of the "unconditional" branch embed the unconditional label.

        Raises:
            BackendError: The engine failed.
        """
        labels = [int(label) for label in _labels(request.labels) for _ in range(request.images_per_prompt)]
        if branch == "unconditional":
            labels = [self.unconditional] * len(labels)
        distinct, place = np.unique(np.array(labels, np.int64), return_inverse=True)
        embeddings = [self._backend.run({"label": distinct[i : i + 1]})[self._output] for i in range(len(distinct))]
        return {self._output: np.concatenate(embeddings)[place]}

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are."""
        return images

    def example(self) -> dict[str, Any]:
        """The first class."""
        return {"labels": 0}

    def close(self) -> None:
        """Free the label encoder."""
        self._backend.close()


def _labels(value: Any) -> tuple[Any, ...]:
    if as_integer(value) is not None:
        return (value,)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        raise SpecError(f"labels: got {shown(value)}, expected a number or a list of numbers")
    return tuple(value)
