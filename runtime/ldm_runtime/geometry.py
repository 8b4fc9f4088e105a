"""Sizes that a model's graphs take, and the conversion of pixels to latents, which happens nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from ldm_runtime.errors import SpecError
from ldm_runtime.model import DECODER, UNET, ModelDescription
from ldm_runtime.number_checks import as_integer, shown
from ldm_runtime.specs import Axis

__all__ = ["Geometry"]


@dataclass(frozen=True)
class Geometry:
    """Shapes that a model takes: channels, height and width of the latents, images per call, and pixels per latent.

    Attributes:
        channels: Latent channels.
        height, width: Bounds in latents; ``opt`` is the model's default size.
        images: Maximum number of images of one call.
        factor: Pixels per latent along each side.
        image_channels: Channels of the decoded image.
    """

    channels: int
    height: Axis
    width: Axis
    images: int
    factor: int
    image_channels: int = 3

    @classmethod
    def of(cls, model: ModelDescription) -> Geometry:
        """Read the sizes from the specs of UNet and decoder.

        A guided image takes one row of the UNet per guidance branch, so the UNet bounds the number of images too.

        Raises:
            SpecError: The ranks of the specs are not those of a latent diffusion model.
        """
        latents, image = model.components[DECODER].inputs[0], model.components[DECODER].outputs[0]
        if len(latents.shape) != 4 or len(image.shape) != 4:
            raise SpecError(f"decoder: got {latents} and {image}, expected 4 axes each; rebuild the bundle")
        batch, _, height, width = map(_axis, latents.shape)
        rows = _axis(model.components[UNET].inputs[0].shape[0])
        images = min(batch.max, max(1, rows.max // max(1, len(model.guidance))))
        return cls(model.latents.channels, height, width, images, model.latents.factor, image.bounds("opt")[1])

    def latents_of(self, side: str, pixels: object) -> int:
        """Convert pixels to latents along ``side`` ("height" or "width"); None means the model's default size.

        Raises:
            SpecError: Not a multiple of the factor, or out of bounds.
        """
        axis = self.height if side == "height" else self.width
        if pixels is None:
            return axis.opt
        low, high = axis.min * self.factor, axis.max * self.factor
        size = as_integer(pixels)
        if size is None or size % self.factor or not low <= size <= high:
            expected = f"a multiple of {self.factor} from {low} to {high} pixels"
            raise SpecError(f"{side}: got {shown(pixels)}, expected {expected}")
        return size // self.factor


def _axis(dim: Axis | int) -> Axis:
    return dim if isinstance(dim, Axis) else Axis("fixed", dim, dim, dim)
