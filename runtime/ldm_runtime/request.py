"""What a caller asks for, and the plan it becomes once checked against what the model takes."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.ddim import FLOAT32_MAX
from ldm_runtime.errors import SpecError
from ldm_runtime.noise import TorchGenerator
from ldm_runtime.specs import Axis, TensorSpec


@dataclass(frozen=True)
class Geometry:
    """What the loaded graphs take: latent channels, latent height and width, images at once; and pixels per latent."""

    channels: int
    height: Axis
    width: Axis
    images: int
    factor: int

    @classmethod
    def of(cls, latents: TensorSpec, image: TensorSpec) -> Geometry:
        """From the decoder's input [images, channels, height, width] and output [images, 3, factor × height, …].

        Raises:
            SpecError: they have other ranks, or the image is smaller than the latents.
        """
        expected = "expected [images, channels, height, width] and an image at least as high"
        if len(latents.shape) != 4 or len(image.shape) != 4:
            raise SpecError(f"decoder: got {latents} and {image}, {expected}; rebuild the bundle")
        batch, channels, height, width = map(_axis, latents.shape)
        factor = image.bounds("opt")[2] // latents.bounds("opt")[2]
        if factor < 1:
            raise SpecError(f"decoder: got {latents} and {image}, {expected}; rebuild the bundle")
        return cls(channels.max, height, width, batch.max, factor)


def _axis(dim: Axis | int) -> Axis:
    return dim if isinstance(dim, Axis) else Axis("fixed", dim, dim, dim)


@dataclass(frozen=True, eq=False)
class Request:
    """One generation, as asked.

    Attributes:
        prompts: what to draw: one text or several.
        negative_prompt: what to steer away from, one for all or one per prompt; used with guidance only.
        seed: an int seeds one stream for the whole batch, like one torch generator; a list gives each image a stream
            of its own, so that its picture does not depend on the others; None draws a fresh seed.
        eta: 0 is deterministic DDIM, above it the steps add noise (equation 16 of arXiv 2010.02502).
        guidance_scale: 1 turns guidance off, and the unguided branch is then not computed.
        num_inference_steps: denoising steps.
        height, width: pixels, multiples of the autoencoder's factor, 8 as a rule; None for the model's own.
        images_per_prompt: pictures for each prompt.
        latents: starting noise float32 [images, channels, height/factor, width/factor] in place of the seed's.
    """

    prompts: str | Sequence[str]
    negative_prompt: str | Sequence[str] = ""
    seed: int | Sequence[int] | None = None
    eta: float = 0.0
    guidance_scale: float = 1.0
    num_inference_steps: int = 50
    height: int | None = None
    width: int | None = None
    images_per_prompt: int = 1
    latents: NDArray[np.float32] | None = None

    def plan(self, geometry: Geometry) -> Plan:
        """Check every field but eta and the number of steps, which the scheduler checks.

        Raises:
            SpecError: names the field, what was given and what is expected.
        """
        prompts = _texts("prompts", self.prompts)
        negative = _texts("negative_prompt", self.negative_prompt)
        if len(negative) not in (1, len(prompts)):
            raise SpecError(
                f"negative_prompt: got {len(negative)} for {len(prompts)} prompts, expected one, or one each"
            )
        if not all(prompt.strip() for prompt in prompts) or not prompts:
            raise SpecError("prompts: got an empty prompt, expected a text of at least one character")
        _whole("images_per_prompt", self.images_per_prompt, 1, geometry.images)
        images = len(prompts) * self.images_per_prompt
        if images > geometry.images:
            raise SpecError(
                f"prompts: got {images} images in one call, expected 1..{geometry.images}; make several calls"
            )
        _number("guidance_scale", self.guidance_scale)
        height, width = (
            axis.opt if size is None else _latents(name, size, axis, geometry.factor)
            for name, size, axis in (("height", self.height, geometry.height), ("width", self.width, geometry.width))
        )
        plan = Plan(
            rows=_repeated(prompts, self.images_per_prompt),
            negative_rows=_repeated(negative * (len(prompts) // len(negative)), self.images_per_prompt),
            seeds=_seeds(self.seed, images),
            guidance_scale=float(self.guidance_scale),
            shape=(images, geometry.channels, height, width),
            latents=self.latents,
        )
        _check_latents(self.latents, plan.shape)
        return plan


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked request: prompt and negative prompt of every image, seeds, latents' shape [images, C, h, w]."""

    rows: tuple[str, ...]
    negative_rows: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scale: float
    shape: tuple[int, int, int, int]
    latents: NDArray[np.float32] | None

    @property
    def guided(self) -> bool:
        """True where each step computes the unguided branch too."""
        return self.guidance_scale != 1.0

    def noise(self) -> Iterator[NDArray[np.float32]]:
        """Standard normal float32 of ``shape`` without end: the starting latents unless given, then each step's."""
        generators = [TorchGenerator(seed) for seed in self.seeds]
        shape = self.shape if len(generators) == 1 else (1, *self.shape[1:])
        streams = [generator.endless(shape) for generator in generators]
        while True:
            yield np.concatenate([next(stream) for stream in streams])


def fresh_seed() -> int:
    """A seed from the system's entropy, 0 … 2**32 - 1."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def _texts(name: str, given: Any) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise SpecError(f"{name}: got {given!r:.60}, expected a text or a list of texts")
    return tuple(texts)


def _repeated(texts: tuple[str, ...], times: int) -> tuple[str, ...]:
    return tuple(text for text in texts for _ in range(times))


def _seeds(seed: int | Sequence[int] | None, images: int) -> tuple[int, ...]:
    if seed is None:
        return (fresh_seed(),)
    seeds = tuple(seed) if isinstance(seed, list | tuple) else (seed,)
    if isinstance(seed, list | tuple) and len(seeds) != images:
        raise SpecError(f"seed: got {len(seeds)} seeds for {images} images, expected one number, or one per image")
    for one in seeds:
        TorchGenerator(one)
    return seeds


def _check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    if latents is None:
        return
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32 or latents.shape != shape:
        got = f"{latents.dtype} {list(latents.shape)}" if isinstance(latents, np.ndarray) else type(latents).__name__
        raise SpecError(f"latents: got {got}, expected a float32 array {list(shape)}")
    if not np.isfinite(latents).all():
        raise SpecError("latents: got NaN or infinite values, expected finite ones")


def _latents(name: str, pixels: Any, axis: Axis, factor: int) -> int:
    low, high = axis.min * factor, axis.max * factor
    if type(pixels) is not int or pixels % factor or not low <= pixels <= high:
        raise SpecError(f"{name}: got {pixels!r}, expected a multiple of {factor} from {low} to {high} pixels")
    return pixels // factor


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise SpecError(f"{name}: got {value!r}, expected a whole number from {low} to {high}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
        raise SpecError(f"{name}: got {reprlib.repr(value)}, expected a finite number of float32's range")
