"""The request of a caller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.errors import SpecError
from ldm_runtime.guidance import FULL_INTERVAL
from ldm_runtime.noise import TorchGenerator
from ldm_runtime.number_checks import integer

__all__ = ["AUTO", "Request", "RequestOptions", "fresh_seed", "seeds_of"]

F32 = NDArray[np.float32]
MAX_REPEATS = 4096
AUTO: Literal["auto"] = "auto"
"""Value of ``num_inference_steps`` that takes the steps of a measured setting."""


class RequestOptions(TypedDict, total=False):
    """The fields of ``Request`` except ``prompts``, for functions that take them as keyword arguments."""

    negative_prompt: str | Sequence[str] | None
    count: int | None
    seed: int | Sequence[int] | None
    eta: float | None
    guidance_scale: float | None
    num_inference_steps: int | Literal["auto"] | None
    height: int | None
    width: int | None
    images_per_prompt: int
    latents: F32 | None
    labels: int | Sequence[int] | None
    image: Any
    mask: Any
    strength: float | None
    padding_mask_crop: int | None
    mask_blur: float | None
    segmentation: Any
    tokens: Any
    layout: Any
    guidance_interval: tuple[float, float]
    guidance_every: int
    scheduler: str | None
    guidance_rescale: float
    clip_skip: int
    prompt_chunks: int
    prompt_weights: bool
    cache_every: int
    full_steps: int | Sequence[int] | None
    budget: float | None
    prompts_2: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    original_size: tuple[int, int] | None
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int] | None
    negative_original_size: tuple[int, int] | None
    negative_crops_coords_top_left: tuple[int, int]
    negative_target_size: tuple[int, int] | None
    loras: Mapping[str, float] | None


@dataclass(frozen=True, eq=False)
class Request:
    """Options for generating images. None selects the model's default from the bundle.

    Attributes:
        prompts: What the images show, one text or several; for models conditioned on text.
        negative_prompt: What the images must not show, one text for all or one per prompt; used with guidance only.
            None is the empty prompt, or zeros instead of hidden states for models that were trained that way.
        count: Number of images; for models without conditioning.
        seed: An int seeds one noise stream for the whole batch, like one torch generator. A list gives each image its
            own stream, so that its result does not depend on the other images. None draws a new seed.
        eta: 0 is deterministic DDIM; above 0 the steps add noise (equation 16 of arXiv:2010.02502). Schedulers without
            eta ignore it.
        guidance_scale: 1 turns guidance off, and the unconditional branch is not evaluated.
        num_inference_steps: Denoising steps. "auto" takes the measured setting with the fewest steps that has
            ``budget`` or, without a budget, as many correct images as the model's default number of steps.
        height, width: Size in pixels, multiples of the model's factor.
        images_per_prompt: Number of images for each prompt, label, image, segmentation or layout.
        latents: Initial noise float32 [images, channels, height / factor, width / factor] instead of the seed's.
        labels: Class numbers, one or several; for models conditioned on class labels.
        image: One or more images, as ``conditioning.image.image_array`` takes them; for models that start from images.
        mask: One mask, or one for each image, white where the image is repainted; for models that inpaint.
        strength: Share of the steps that run, above 0 and at most 1; the image gets as much noise as the first of these
            steps expects. Low values stay close to the image. For models that can start from an image or from noise;
            the defaults are those of diffusers: 0.8, and 1 with a mask; for Stable Diffusion XL 0.3 and 0.9999.
        padding_mask_crop: Generate only the part of the image around the mask, extended by this number of pixels on
            each side, at the full size of the result, and paste it into the whole image. None generates the whole
            image.
        mask_blur: Standard deviation in pixels, from 0 to 64, of the Gaussian blur of the mask, so that with
            ``padding_mask_crop`` the edge is soft. Pixels that are at least half white are repainted. None does not
            blur.
        segmentation: A class number for each pixel, as ``conditioning.segmentation.class_array`` takes them; for
            models conditioned on segmentations.
        tokens: Tokens of a layout [T] or of several [N, T]; for models conditioned on layouts.
        layout: Instead of tokens, (category, (x, y, width, height)) of each object, in shares of the image; or a list
            of such layouts. See ``conditioning.layout_tokens.LayoutVocabulary.encode``.
        guidance_interval, guidance_every: See ``guidance.step_branches``. Steps that evaluate one branch take half the
            time and change the image slightly.
        scheduler: Class name in diffusers of another scheduler than the model's. It takes the options in the model's
            checkpoint, as ``from_config`` of diffusers does.
        guidance_rescale: Share of the rescaled prediction in the result, 0 to 1; see ``guidance.rescale``.
        clip_skip: Number of last layers of a CLIP text encoder to skip for prompts, 0 for none; as in diffusers,
            negative prompts skip none.
        prompt_chunks: Maximum number of chunks of 75 tokens in which a prompt that is too long for the text encoder is
            encoded. 1 cuts long prompts off. A plan has the number that its longest prompt needs; shorter prompts are
            padded with empty chunks.
        prompt_weights: True reads weights in prompts, e.g. ``(word:1.3)``; see ``conditioning.prompt_weights``.
        cache_every, full_steps: See ``feature_cache.shallow_calls``. UNet calls that reuse features take a fraction of
            the time and change the image slightly.
        budget: Minimum PSNR in dB. Takes steps, ``cache_every`` and ``guidance_every`` of the fastest setting in the
            loaded precision with which every image that ``ldm-export bench --quality --save`` measured has this PSNR.
        prompts_2, negative_prompt_2: Separate texts for the second text encoder, one for all or one per prompt.
        original_size, crops_coords_top_left, target_size: Height and width, or top and left, in pixels; for models with
            micro-conditioning, see ``conditioning.micro_conditioning``. None is the image's size.
        negative_original_size, negative_crops_coords_top_left, negative_target_size: The same for the unconditional
            branch. Without negative sizes it has the values of the conditional branch. With ``image``, it always has
            the crop of the conditional branch.
        loras: Weights of the bundle's LoRA adapters by name, e.g. ``{"style": 0.7}``; None or weights of 0 change
            nothing. See ``loras.selection``.
    """

    prompts: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None
    count: int | None = None
    seed: int | Sequence[int] | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    num_inference_steps: int | Literal["auto"] | None = None
    height: int | None = None
    width: int | None = None
    images_per_prompt: int = 1
    latents: F32 | None = None
    labels: int | Sequence[int] | None = None
    image: Any = None
    mask: Any = None
    strength: float | None = None
    padding_mask_crop: int | None = None
    mask_blur: float | None = None
    segmentation: Any = None
    tokens: Any = None
    layout: Any = None
    guidance_interval: tuple[float, float] = FULL_INTERVAL
    guidance_every: int = 1
    scheduler: str | None = None
    guidance_rescale: float = 0.0
    clip_skip: int = 0
    prompt_chunks: int = 1
    prompt_weights: bool = False
    cache_every: int = 1
    full_steps: int | Sequence[int] | None = None
    budget: float | None = None
    prompts_2: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crops_coords_top_left: tuple[int, int] = (0, 0)
    negative_target_size: tuple[int, int] | None = None
    loras: Mapping[str, float] | None = None

    def repeats(self) -> int:
        """Checked ``images_per_prompt``.

        Raises:
            SpecError: It is not a whole number from 1 to ``MAX_REPEATS``.
        """
        return integer("images_per_prompt", self.images_per_prompt, 1, MAX_REPEATS)

    def given(self) -> set[str]:
        """Names of the fields that differ from their defaults."""
        return {item.name for item in fields(self) if not _is_default(getattr(self, item.name), item.default)}


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and not isinstance(value, np.ndarray) and value == default)


def fresh_seed() -> int:
    """Return a random seed from the system's entropy, 0 to 2**32 - 1."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def seeds_of(seed: int | Sequence[int] | None, images: int) -> tuple[int, ...]:
    """Check seeds: one for the whole batch, or one for each of ``images``.

    Raises:
        SpecError: The number of seeds is another, or a seed is out of range.
    """
    if seed is None:
        return (fresh_seed(),)
    listed = isinstance(seed, list | tuple) or (isinstance(seed, np.ndarray) and seed.ndim == 1)
    seeds: tuple[Any, ...] = tuple(seed) if listed else (seed,)  # type: ignore[arg-type]
    if listed and len(seeds) != images:
        raise SpecError(f"seed: got {len(seeds)} seeds for {images} images, expected one number, or one per image")
    return tuple(TorchGenerator(one).seed for one in seeds)


def check_latents_given(latents: Any, shape: tuple[int, ...]) -> F32 | None:
    """Check initial latents that a caller gave; None stays None.

    Raises:
        SpecError: They have another dtype or shape, or values that are not finite.
    """
    if latents is None:
        return None
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32 or latents.shape != shape:
        got = f"{latents.dtype} {list(latents.shape)}" if isinstance(latents, np.ndarray) else type(latents).__name__
        raise SpecError(f"latents: got {got}, expected a float32 array {list(shape)}")
    if not np.isfinite(latents).all():
        raise SpecError("latents: got NaN or infinite values, expected finite ones")
    return latents
