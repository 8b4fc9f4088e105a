"""Safety checker: flags decoded images that must not be returned, like diffusers' StableDiffusionSafetyChecker.

It does not condition the UNet: the pipeline calls ``flags`` for decoded images and makes flagged images black.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.backends import Backend
from ldm_runtime.errors import ManifestError
from ldm_runtime.images import to_uint8
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.request import Request

__all__ = ["CONCEPT_SCORES", "PIXELS", "SHORTEST_EDGE", "SPECIAL_SCORES", "SafetyChecker"]

F32 = NDArray[np.float32]
PIXELS, SPECIAL_SCORES, CONCEPT_SCORES = "pixels", "special_scores", "concept_scores"
"""Input and outputs of the component."""
SHORTEST_EDGE = "shortest_edge"
"""Setting: length of the shorter side of a resized image, before its middle is cut out."""
MORE_CARE = np.float32(0.01)
"""Added to the concept scores of an image in which a special-care concept was found."""


class SafetyChecker:
    """Flags images whose CLIP embedding is too similar to that of a concept; each concept has its own threshold.

    Args:
        backend: ``PIXELS`` float32 [B, 3, S, S] from 0 to 255 -> ``SPECIAL_SCORES`` and ``CONCEPT_SCORES``, float32
            [B, concepts]: similarities minus thresholds.
        edge: The setting ``SHORTEST_EDGE``, at least S.
    """

    kind: ClassVar[str] = "safety_checker"
    fields: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, backend: Backend, edge: int):
        self._backend, self._edge = backend, edge
        self._side = backend.inputs[0].bounds("opt")[-1]

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> SafetyChecker:
        """Construct from a manifest entry.

        Raises:
            ManifestError: The component is missing or of another form.
        """
        backend, edge = backends.get(spec.component), spec.settings.get(SHORTEST_EDGE, 0)
        if backend is None:
            raise ManifestError(f"conditioning: {cls.kind}: got {spec}, expected a component; rebuild the bundle")
        names = (*(one.name for one in backend.inputs), *(one.name for one in backend.outputs))
        shape = backend.inputs[0].bounds("opt")
        fits = len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] <= edge
        if names != (PIXELS, SPECIAL_SCORES, CONCEPT_SCORES) or not fits:
            raise ManifestError(
                f"{spec.component}: got {', '.join(names)}, {list(shape)} and {SHORTEST_EDGE} {edge}, expected "
                f"{PIXELS} [batch, 3, size, size], {SPECIAL_SCORES} and {CONCEPT_SCORES}; rebuild the bundle"
            )
        return cls(backend, edge)

    def images(self, request: Request) -> int:
        """1: a request has no fields of this kind."""
        return 1

    def size(self, request: Request) -> tuple[int, int] | None:
        """None: the request decides the size."""
        return None

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Nothing for the UNet."""
        return {}

    def finish(self, request: Request, images: F32) -> F32:
        """Decoded images, as they are; see ``flags``."""
        return images

    def example(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def flags(self, images: F32) -> NDArray[np.bool_]:
        """Return which of the decoded images float32 [B, 3, H, W] in [0, 1] are flagged; bool [B].

        Raises:
            SpecError: An image is NaN or infinite.
            BackendError: The engine failed.
        """
        flagged = []
        for image in to_uint8(images):
            scores = self._backend.run({PIXELS: self._pixels(image)})
            care = MORE_CARE * (np.round(scores[SPECIAL_SCORES], 3) > 0).any()
            flagged.append(bool((np.round(scores[CONCEPT_SCORES] + care, 3) > 0).any()))
        return np.array(flagged, bool)

    def _pixels(self, image: NDArray[np.uint8]) -> F32:
        """Resize and crop an image uint8 [H, W, 3] like transformers' CLIPImageProcessor; float32 [1, 3, S, S]."""
        sides, side = image.shape[:2], self._side
        height, width = (int(self._edge * length / min(sides)) for length in sides)
        resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        top, left = (height - side) // 2, (width - side) // 2
        return np.ascontiguousarray(resized[top : top + side, left : left + side].transpose(2, 0, 1)[None])

    def close(self) -> None:
        """Free the component; the next call loads it again."""
        self._backend.close()
