"""Decoding: turns latents into pixels, blackens the images that the safety checker flags, and completes the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend, SpecBackend
from ldm_runtime.conditioning import Conditioner, SafetyChecker
from ldm_runtime.errors import LdmError
from ldm_runtime.model import DECODER, IMAGE, LATENTS
from ldm_runtime.request import Request

__all__ = ["Decoding"]

F32 = NDArray[np.float32]


class Decoding:
    """The decoder of a model, and what is done to its images.

    Args:
        backends: Component -> its backend, with ``decoder`` among them.
        conditioners: The model's conditioners, which complete the images.
        checker: The safety checker; None checks nothing.
        keep_loaded: False frees the decoder and the checker after each use.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        conditioners: Sequence[Conditioner],
        checker: SafetyChecker | None,
        keep_loaded: bool,
    ):
        self._backends, self._conditioners = backends, conditioners
        self._checker, self._keep_loaded = checker, keep_loaded

    @property
    def checks(self) -> bool:
        """True if a safety checker checks the images."""
        return self._checker is not None

    def decode(self, latents: F32) -> F32:
        """Decode latents float32 [B, C, h, w] to images float32 [B, channels, H, W] in [0, 1].

        On a GPU, as many images are decoded together as fit into its free memory.

        Raises:
            SpecError: The decoder does not take the latents.
            BackendError: The engine failed.
        """
        decoder = self._backends[DECODER]
        parts: list[F32] = []
        while (done := sum(map(len, parts))) < len(latents) or not parts:
            left = latents[done:]
            parts.append(decoder.run({LATENTS: left[: self._images_per_call(left)]})[IMAGE])
        if not self._keep_loaded:
            decoder.close()
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decodes_together(self, latents: F32) -> bool:
        """True if decoding many images in one call saves time, as on a GPU. Also False if the decoder does not load."""
        try:
            return self._images_per_call(np.concatenate([latents, latents])) is not None
        except LdmError:  # decoding reports it
            return False

    def _images_per_call(self, latents: F32) -> int | None:
        decoder = self._backends[DECODER]
        return decoder.most_rows({LATENTS: latents}) if isinstance(decoder, SpecBackend) and len(latents) > 1 else None

    def finish(self, request: Request, images: F32) -> tuple[F32, tuple[bool, ...] | None]:
        """Check and complete decoded images; see ``LatentDiffusionPipeline.finish``."""
        flagged = None
        if self._checker is not None:
            flags = self._checker.flags(images)
            images, flagged = np.where(flags[:, None, None, None], np.float32(0), images), tuple(flags.tolist())
            if not self._keep_loaded:
                self._checker.close()
        for conditioner in self._conditioners:
            images = conditioner.finish(request, images)
        return images, flagged
