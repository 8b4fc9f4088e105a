"""Start image conditioning: denoising starts from a noised image instead of from noise alone.

Without a mask this is image to image (SDEdit, Meng et al. 2021, arXiv:2108.01073), with a mask it is inpainting.
Images, masks and noise are processed like in diffusers' StableDiffusionImg2ImgPipeline and
StableDiffusionInpaintPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.backends import Backend
from ldm_runtime.conditioning.image import example_image, image_array
from ldm_runtime.conditioning.image_sizes import check_sides, check_size, latent_sides, report_fitted
from ldm_runtime.conditioning.masks import binary_mask, check_mask, example_mask
from ldm_runtime.conditioning.pictures import (
    MAX_BLUR,
    Box,
    blurred,
    crop_box,
    pasted,
    pictures_of,
    resized,
    sides_of,
)
from ldm_runtime.conditioning.strength import STRENGTHS, default_strengths
from ldm_runtime.errors import ManifestError, SpecError
from ldm_runtime.model import ConditioningSpec
from ldm_runtime.noise_stream import NoiseStream
from ldm_runtime.number_checks import as_integer, integer, number
from ldm_runtime.plan import Plan
from ldm_runtime.request import Request
from ldm_runtime.specs import Axis
from ldm_runtime.start import Kept, Start, StartImage

__all__ = ["StartImageConditioner"]

F32 = NDArray[np.float32]
MAX_PADDING = 2**16


class StartImageConditioner:
    """Encodes images to latents and adds noise to them; denoising starts from the result.

    Args:
        backend: The autoencoder's encoder: ``image`` float32 [N, channels, H, W] in [-1, 1] -> ``mean`` and
            ``deviation`` float32 [N, C, h, w] of the latents.
        output: Input of an inpainting UNet for the mask and the latents of the image without its masked part, float32
            [N, 1 + C, h, w]. None if the UNet has no such input; the unmasked part is then restored after each step.
        strengths: Default strength without and with a mask.
    """

    kind: ClassVar[str] = "start_image"
    fields: ClassVar[frozenset[str]] = frozenset({"image", "mask", "strength", "padding_mask_crop", "mask_blur"})

    def __init__(self, backend: Backend, output: str | None = None, strengths: tuple[float, float] = STRENGTHS):
        self._backend, self._output, self._strengths = backend, output, strengths
        self._tensor = backend.inputs[0]

    @classmethod
    def open(
        cls, spec: ConditioningSpec, backends: Mapping[str, Backend], files: Callable[[str], Path]
    ) -> StartImageConditioner:
        """Construct from a manifest entry.

        Raises:
            ManifestError: The encoder is missing or of another form, or a default strength is no share.
        """
        strengths = default_strengths(spec.settings)
        if spec.component not in backends or len(spec.inputs) > 1:
            raise ManifestError(f"conditioning: start_image: got {spec}, expected an encoder; rebuild the bundle")
        backend = backends[spec.component]
        got = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in (*backend.inputs, *backend.outputs)]
        if got != [(name, "float32", 4) for name in ("image", "mean", "deviation")]:
            raise ManifestError(f"{spec.component}: tensors are {got}, expected image, mean and deviation; rebuild it")
        return cls(backend, spec.inputs[0] if spec.inputs else None, strengths)

    @property
    def needs_mask(self) -> bool:
        """True if the UNet was trained for inpainting, so that requests must have an image and a mask."""
        return self._output is not None

    def images(self, request: Request) -> int:
        """Check which fields are given and return 1; other kinds of conditioning decide the number of images.

        Raises:
            SpecError: A field is given without another one that it needs.
        """
        if self.needs_mask and (request.image is None or request.mask is None):
            missing = "image" if request.image is None else "mask"
            raise SpecError(f"{missing}: got none, expected an image and a mask; this model repaints parts of images")
        for name in ("mask", "strength"):
            if request.image is None and getattr(request, name) is not None:
                raise SpecError(f"{name}: got a value without an image; give the image that it applies to, or none")
        for name in ("padding_mask_crop", "mask_blur"):
            if request.mask is None and getattr(request, name) is not None:
                raise SpecError(f"{name}: got a value without a mask; give an image and a mask, or leave it out")
        if request.image is not None and request.latents is not None:
            raise SpecError("latents: got a value beside an image, which decides the latents; leave one of them out")
        return 1

    def converted(self, request: Request) -> Request:
        """Convert image and mask to PIL images, unless they are in another form, and blur the mask.

        The plan keeps the result.

        Raises:
            SpecError: ``mask_blur`` is out of range, or the mask is in a form that is not blurred.
        """
        image, mask = pictures_of(request.image), pictures_of(request.mask)
        if request.mask is not None and request.mask_blur is not None:
            radius = number("mask_blur", request.mask_blur, 0.0, MAX_BLUR)
            if not mask:
                raise SpecError("mask_blur: expected masks as PIL images or uint8 arrays; blur other masks beforehand")
            mask, request = blurred(mask, radius), replace(request, mask_blur=None)
        return replace(request, image=image or request.image, mask=mask or request.mask)

    def size(self, request: Request) -> tuple[int, int] | None:
        """Height and width of the latents: those of the image unless the request asks for others.

        None with a mask: the request or the model decides the size, as in StableDiffusionInpaintPipeline.
        """
        pictures = pictures_of(request.image)
        if request.image is None or (request.mask is not None and pictures):
            return None
        dims, sides = self._tensor.shape[2:], sides_of("image", request.image)
        if pictures:
            asked = (as_integer(request.height), as_integer(request.width))
            scales = [dim.scale if isinstance(dim, Axis) else 1 for dim in dims]
            sides = tuple(
                other or side // scale * scale or side for other, side, scale in zip(asked, sides, scales, strict=True)
            )
        check_sides("image", sides, dims)
        return latent_sides(sides, dims)

    def rows(self, request: Request, branch: str) -> dict[str, NDArray[Any]]:
        """Empty: the UNet's input depends on the noise, so ``begin`` returns it."""
        return {}

    def finish(self, request: Request, images: F32) -> F32:
        """Return decoded images unchanged or, if only the part around the mask was generated, pasted into the image."""
        request = self.converted(request)
        box = self._box(request, images.shape[2:]) if request.image is not None else None
        if box is None:
            return images
        return pasted(images, pictures_of(request.image)[0], pictures_of(request.mask)[0], box)

    def example(self) -> dict[str, Any]:
        """Empty, or an image and a mask if the UNet needs them."""
        return self.examples()[-1] if self.needs_mask else {}

    def examples(self) -> tuple[dict[str, Any], ...]:
        """Fields of requests for image to image and for inpainting: a colour gradient, without and with a mask."""
        image = example_image(self._tensor)
        masked = {"image": image, "mask": example_mask(image)}
        return (masked,) if self.needs_mask else ({"image": image}, masked)

    def read(self, request: Request, images: int, sides: tuple[int, int]) -> StartImage | None:
        """Read image, mask and strength of a request that ``images`` has accepted; None if it has no image.

        Args:
            request: The request.
            images: Number of images to generate.
            sides: Their height and width in pixels.

        Raises:
            SpecError: An image, a mask or the strength cannot be used, or their numbers do not fit.
        """
        if request.image is None:
            return None
        image_strength, mask_strength = self._strengths
        strength = image_strength if request.mask is None else mask_strength
        if request.strength is not None:
            strength = number("strength", request.strength, 0.0, 1.0)
        box = self._box(request, sides)
        image = image_array("image", resized(request.image, sides, box=box))
        check_size("image", image, self._tensor)
        mask = None if request.mask is None else self._mask(request, image, sides, box)
        if box is None and not pictures_of(request.image).from_array:
            report_fitted("image", request.image, image)
        for name, array in (("image", image), ("mask", image if mask is None else mask)):
            if images % len(array):
                raise SpecError(f"{name}: got {len(array)} for {images} images to generate, expected one, or one each")
        return StartImage(image, mask, strength, mask is not None and not self.needs_mask)

    def _mask(self, request: Request, image: F32, sides: tuple[int, int], box: Box | None) -> F32:
        got, expected = (sides_of(name, getattr(request, name)) for name in ("mask", "image"))
        if got != expected:
            shown = [f"{height} x {width}" for height, width in (got, expected)]
            raise SpecError(f"mask: got {shown[0]} pixels (height, width), expected the image's {shown[1]}; resize it")
        mask = binary_mask(resized(request.mask, sides, mask=True, box=box))
        check_mask(mask if box is None else binary_mask(resized(request.mask, (got[0], got[1]), mask=True)), image)
        return mask

    def _box(self, request: Request, sides: tuple[int, int]) -> Box | None:
        """The part of the image to generate if the request asks for a crop around the mask, else None."""
        if request.padding_mask_crop is None:
            return None
        padding = integer("padding_mask_crop", request.padding_mask_crop, 0, MAX_PADDING)
        images, masks = pictures_of(request.image), pictures_of(request.mask)
        if len(images) != 1 or len(masks) != 1:
            raise SpecError("padding_mask_crop: expected one image and one mask, as PIL images or uint8 arrays")
        if not np.asarray(masks[0].convert("L")).any():
            raise SpecError("mask: got an empty one, expected white where the image is repainted")
        return crop_box(masks[0], sides, padding)

    def begin(self, plan: Plan, given: StartImage, noise: NoiseStream) -> Start:
        """Draw the initial noise in the same order as diffusers' pipelines, and encode the images.

        Args:
            plan: The plan.
            given: Images of the plan.
            noise: Noise of the plan, from which nothing has been drawn.

        Raises:
            BackendError: The engine failed.
        """
        image, mask, count = given.image * 2 - 1, given.mask, plan.images
        pure = mask is not None and given.strength == 1
        encoded = None if pure and not given.puts_back else self._encode(image, noise, count)
        drawn = noise.draw(count)
        if pure or encoded is None:
            latents = plan.scaled(drawn)
        else:
            of_image, of_noise = plan.trajectory.noisy_weights[0]
            latents = np.asarray(of_image * encoded + of_noise * drawn, np.float32)
        if mask is None:
            return Start(latents, noise)
        factor = mask.shape[3] // plan.shape[3]
        small = _tiled(mask[:, :, ::factor, ::factor], count)
        if self._output is None:
            assert encoded is not None
            noise.draw(count if noise.separate else max(len(image), len(mask)))  # of the masked image, as in diffusers
            return Start(latents, noise, Kept(small, encoded, drawn))
        masked = self._encode(image * (mask < 0.5), noise, count)
        return Start(latents, noise, None, {self._output: np.concatenate([small, masked], axis=1)})

    def distribution(self, image: F32) -> tuple[F32, F32]:
        """Mean and deviation, float32 [N, C, h, w], of the latents of images float32 [N, channels, H, W] in [-1, 1].

        Raises:
            SpecError: The encoder does not take the images.
            BackendError: The engine failed.
        """
        parts = [self._backend.run({"image": image[i : i + 1]}) for i in range(len(image))]
        mean, deviation = (np.concatenate([part[name] for part in parts]) for name in ("mean", "deviation"))
        return mean, deviation

    def _encode(self, image: F32, noise: NoiseStream, count: int) -> F32:
        """Sample latents float32 [count, C, h, w] from the encoder's distribution for each image."""
        mean, deviation = self.distribution(image)
        if noise.separate:
            mean, deviation = _tiled(mean, count), _tiled(deviation, count)
        latents: F32 = mean + deviation * noise.draw(len(mean))
        return _tiled(latents, count)

    def close(self) -> None:
        """Free the encoder."""
        self._backend.close()


def _tiled(array: F32, count: int) -> F32:
    """Repeat a whole array [n, …] to [count, …], in the order in which diffusers repeats images."""
    return np.ascontiguousarray(np.concatenate([array] * (count // len(array))))
