"""Conditioning: encodes the text, class label, image, … of a request to tensors that the UNet takes.

Each kind is one module with one class, registered in ``KINDS``. A bundle's manifest names the kinds its model uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.guidance_scale import GuidanceScaleConditioner
from ldm_runtime.conditioning.image import ImageConditioner
from ldm_runtime.conditioning.label import LabelConditioner
from ldm_runtime.conditioning.layout import LayoutConditioner
from ldm_runtime.conditioning.masked_image import MaskedImageConditioner
from ldm_runtime.conditioning.micro_conditioning import MicroConditioner
from ldm_runtime.conditioning.safety_checker import SafetyChecker
from ldm_runtime.conditioning.second_text import SecondTextConditioner
from ldm_runtime.conditioning.segmentation import SegmentationConditioner
from ldm_runtime.conditioning.start_image import StartImageConditioner
from ldm_runtime.conditioning.text import TextConditioner
from ldm_runtime.errors import ManifestError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.request import Request

__all__ = [
    "KINDS",
    "KINDS_FIELDS",
    "Conditioner",
    "GuidanceScaleConditioner",
    "ImageConditioner",
    "LabelConditioner",
    "LayoutConditioner",
    "MaskedImageConditioner",
    "MicroConditioner",
    "SafetyChecker",
    "SecondTextConditioner",
    "SegmentationConditioner",
    "StartImageConditioner",
    "TextConditioner",
    "open_conditioner",
]


class Conditioner(Protocol):
    """One kind of conditioning, ready to encode requests.

    Attributes:
        kind: Name in the manifest.
        fields: Fields of ``Request`` it reads; a request that sets the field of a kind the model lacks is refused.
    """

    kind: ClassVar[str]
    fields: ClassVar[frozenset[str]]

    def images(self, request: Request) -> int:
        """Check the request's fields of this kind and return how many images they ask for.

        Raises:
            SpecError: A field is missing or cannot be used.
        """

    def size(self, request: Request) -> tuple[int, int] | None:
        """Height and width of the latents, if the fields of this kind in an accepted request decide them; else None."""

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Encode one guidance branch. Return tensor name -> array [images, …], or [1, …] if equal for all images.

        Args:
            request: A request that ``images`` has accepted, with height, width and guidance scale filled in.
            branch: "conditional" or "unconditional".

        Raises:
            SpecError: A value cannot be encoded.
            BackendError: The engine failed.
        """

    def finish(self, request: Request, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Complete the decoded images float32 [images, channels, H, W] in [0, 1] of an accepted request."""

    def example(self) -> dict[str, Any]:
        """Fields of a small valid request for one image, used by self-tests and benchmarks."""

    def close(self) -> None:
        """Free the engine of the encoding component; the next call loads it again."""


KINDS: tuple[
    type[
        TextConditioner
        | LabelConditioner
        | ImageConditioner
        | MaskedImageConditioner
        | SegmentationConditioner
        | LayoutConditioner
        | StartImageConditioner
        | SecondTextConditioner
        | MicroConditioner
        | GuidanceScaleConditioner
        | SafetyChecker
    ],
    ...,
] = (
    TextConditioner,
    LabelConditioner,
    ImageConditioner,
    MaskedImageConditioner,
    SegmentationConditioner,
    LayoutConditioner,
    StartImageConditioner,
    SecondTextConditioner,
    MicroConditioner,
    GuidanceScaleConditioner,
    SafetyChecker,
)
"""The class of every kind. ``open(spec, backends, files)`` constructs one from a manifest entry."""
KINDS_FIELDS = frozenset(name for kind in KINDS for name in kind.fields)
"""Fields of ``Request`` that belong to some kind of conditioning."""


def open_conditioner(
    spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
) -> Conditioner:
    """Construct the conditioner of a manifest entry.

    Raises:
        ManifestError: The kind is unknown, or a file or component of it cannot be used.
    """
    kinds = {kind.kind: kind for kind in KINDS}
    if spec.kind not in kinds:
        raise ManifestError(
            f"conditioning: kind {spec.kind!r:.60} is none of {', '.join(kinds)}; install a newer ldm-export"
        )
    return kinds[spec.kind].open(spec, backends, files)
