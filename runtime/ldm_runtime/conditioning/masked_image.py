"""Masked image conditioning for inpainting: an image that is repainted where a mask is 1, encoded by a component."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.image import example_image, image_array
from ldm_runtime.conditioning.image_sizes import check_size, fitted, latent_sides, report_fitted
from ldm_runtime.conditioning.masks import binary_mask, check_mask, example_mask
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.request import Request

__all__ = ["MaskedImageConditioner"]

F32 = NDArray[np.float32]


class MaskedImageConditioner:
    """Encodes images without their masked parts; only the masked parts of the result are generated.

    Args:
        backend: The encoder: ``image`` float32 [N, channels, H, W] in [-1, 1] and ``mask`` float32 [N, 1, H, W], 0 or 1
            -> ``output`` float32 [N, C, h, w].
        output: Name of the encoder's output tensor, which is the UNet's input.
    """

    kind: ClassVar[str] = "masked_image"
    fields: ClassVar[frozenset[str]] = frozenset({"image", "mask", "images_per_prompt"})

    def __init__(self, backend: Backend, output: str):
        self._backend, self._output = backend, output

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> MaskedImageConditioner:
        """Construct from a manifest entry.

        Raises:
            ManifestError: The encoder is missing or of another form.
        """
        if spec.component not in backends or len(spec.inputs) != 1:
            raise ManifestError(f"conditioning: masked_image: got {spec}, expected an encoder; rebuild the bundle")
        backend = backends[spec.component]
        got = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in backend.inputs]
        if got != [("image", "float32", 4), ("mask", "float32", 4)]:
            raise ManifestError(f"{spec.component}: inputs are {got}, expected image and mask float32; rebuild it")
        return cls(backend, spec.inputs[0])

    def images(self, request: Request) -> int:
        """Check images and masks and return their number, times ``images_per_prompt``.

        Raises:
            SpecError: One of them is missing, is no supported type, or has a size that the model does not take.
        """
        for name in ("image", "mask"):
            if getattr(request, name) is None:
                raise SpecError(f"{name}: got none, expected an image and a mask; this model repaints parts of images")
        image, mask = self._arrays(request)
        for name, array in (("image", image), ("mask", mask)):
            report_fitted(name, getattr(request, name), array)
        return len(image) * request.repeats()

    def size(self, request: Request) -> tuple[int, int] | None:
        """Height and width of the latents, from those of the images."""
        return latent_sides(self._arrays(request)[0].shape[2:], self._backend.inputs[0].shape[2:])

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """The encoded images float32 [images, C, h, w], the same for every branch.

        Raises:
            BackendError: The engine failed.
        """
        image, mask = self._arrays(request)
        feeds = [{"image": image[i : i + 1] * 2 - 1, "mask": mask[i : i + 1]} for i in range(len(image))]
        encoded = np.concatenate([self._backend.run(feed)[self._output] for feed in feeds])
        return {self._output: np.repeat(encoded, request.images_per_prompt, axis=0)}

    def finish(self, request: Request, images: F32) -> F32:
        """Return decoded images float32 [images, channels, H, W] in [0, 1] where the mask is 1, else the request's."""
        image, mask = (np.repeat(array, request.images_per_prompt, axis=0) for array in self._arrays(request))
        return (1 - mask) * image + mask * images

    def example(self) -> dict[str, Any]:
        """An image of the model's default size with a mask: a colour gradient whose middle is repainted."""
        image = example_image(self._backend.inputs[0])
        return {"image": image, "mask": example_mask(image)}

    def close(self) -> None:
        """Free the encoder."""
        self._backend.close()

    def _arrays(self, request: Request) -> tuple[F32, F32]:
        """Image [N, channels, H, W] in [0, 1] and mask [N, 1, H, W], 0 or 1."""
        sides = self._backend.inputs[0].shape[2:]
        image = image_array("image", fitted(request.image, sides, 1, Image.Resampling.LANCZOS))
        mask = binary_mask(fitted(request.mask, sides, 1, Image.Resampling.NEAREST))
        check_size("image", image, self._backend.inputs[0])
        if mask.shape[2:] != image.shape[2:]:
            got, expected = (" x ".join(map(str, array.shape[2:])) for array in (mask, image))
            raise SpecError(f"mask: got {got} pixels (height, width), expected the image's {expected}; resize the mask")
        check_mask(mask, image)
        return image, np.ascontiguousarray(np.broadcast_to(mask, (len(image), *mask.shape[1:])))
