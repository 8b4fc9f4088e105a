"""Checks a request against a model and computes everything that its denoising loop needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ldm_runtime.conditioning import KINDS_FIELDS, Conditioner, StartImageConditioner, TextConditioner
from ldm_runtime.conditioning.strength import skipped_steps
from ldm_runtime.errors import SpecError
from ldm_runtime.family_schedulers import check_family_scheduler
from ldm_runtime.feature_cache import shallow_calls
from ldm_runtime.geometry import Geometry
from ldm_runtime.guidance import StepBranches, step_branches
from ldm_runtime.loras.selection import Selection, no_selection
from ldm_runtime.measured_settings import settled
from ldm_runtime.model import SHALLOW_UNET, ModelDescription
from ldm_runtime.number_checks import integer, number, shown
from ldm_runtime.plan import Plan
from ldm_runtime.quality import QualityRecord
from ldm_runtime.request import Request, check_latents_given, seeds_of
from ldm_runtime.required_memory import report_memory
from ldm_runtime.schedulers import Scheduler
from ldm_runtime.schedulers.replacement import replacement
from ldm_runtime.start import StartImage
from ldm_runtime.timesteps import model_timesteps, timestep_dtype

__all__ = ["Planner"]

MAX_COUNT = 4096
MAX_VALUES = 2**30
"""Maximum number of values of the images or latents of one call, 4 GiB as float32. Sizes come from callers and from a
bundle's axes; a typing error or a malicious bundle must not exhaust the memory."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Planner:
    """Turns requests into plans.

    Attributes:
        model: Description of the model.
        geometry: Sizes that its graphs take.
        scheduler: Computes the trajectory.
        conditioners: The model's conditioners; they check their own fields of a request.
        record: The bundle's measured settings; None if it has none.
        select: Checks the field ``loras`` of a request.
    """

    model: ModelDescription
    geometry: Geometry
    scheduler: Scheduler
    conditioners: Sequence[Conditioner]
    record: QualityRecord | None = None
    select: Callable[[Any], Selection] = no_selection

    def plan(self, request: Request, precision: str | None = None) -> Plan:
        """Plan a request.

        Args:
            request: The request.
            precision: The precision that is loaded, whose measured settings may be taken; None takes any.

        Raises:
            SpecError: Names the field, what was given and what is expected.
        """
        request, setting = settled(request, self.record, precision)
        self._refuse_foreign_fields(request)
        request = self._converted(request)
        images = self._images(request)
        geometry, defaults = self.geometry, self.model.defaults
        shape = (images, geometry.channels, *self._sides(request))
        _check_memory(shape, geometry)
        report_memory(self.model, shape, geometry.height.opt * geometry.width.opt)
        scale = number("guidance_scale", _or(request.guidance_scale, defaults.guidance_scale))
        steps: Any = _or(request.num_inference_steps, defaults.num_inference_steps)  # the scheduler checks it
        eta = _or(request.eta, defaults.eta)
        scheduler = self.scheduler
        if request.scheduler is not None:
            scheduler = replacement(request.scheduler, self.model.scheduler)
        trajectory = scheduler.trajectory(steps, eta)
        check_family_scheduler(self.model.family, scheduler, trajectory)
        given = self._start_image(request, shape)
        if given is not None and (skipped := skipped_steps(given.strength, int(steps))):
            trajectory = scheduler.trajectory_after(skipped, steps, eta)
        model_timesteps(trajectory.timesteps, timestep_dtype(self.model))
        branches = step_branches(request.guidance_interval, request.guidance_every, len(trajectory))
        guided = bool(self.model.guidance) and (scale > 1.0 if self.model.guidance_above_one else scale != 1.0)
        rescale = number("guidance_rescale", request.guidance_rescale, 0.0, 1.0)
        evaluated = branches if guided else (StepBranches.CONDITIONAL,) * len(trajectory)
        height, width = (side * geometry.factor for side in shape[2:])
        rows = self.model.guidance if guided else ("conditional",)
        texts = [one for one in self.conditioners if isinstance(one, TextConditioner)]
        chunks = max((one.chunks(request, rows) for one in texts), default=1)
        return Plan(
            request=replace(request, height=height, width=width, guidance_scale=scale, prompt_chunks=chunks),
            seeds=seeds_of(request.seed, images),
            shape=shape,
            latents=check_latents_given(request.latents, shape),
            guidance_scale=scale,
            branches=rows,
            steps=evaluated,
            trajectory=trajectory,
            guidance_rescale=rescale if guided else 0.0,
            start_image=given,
            shallow=self._shallow(request, evaluated),
            setting=setting,
            loras=self.select(request.loras),
        )

    @property
    def _starts(self) -> list[StartImageConditioner]:
        return [one for one in self.conditioners if isinstance(one, StartImageConditioner)]

    def _converted(self, request: Request) -> Request:
        for one in self._starts:
            request = one.converted(request)
        return request

    def _start_image(self, request: Request, shape: tuple[int, int, int, int]) -> StartImage | None:
        sides = (shape[2] * self.geometry.factor, shape[3] * self.geometry.factor)
        return next((given for one in self._starts if (given := one.read(request, shape[0], sides)) is not None), None)

    def _shallow(self, request: Request, evaluated: Sequence[StepBranches]) -> tuple[bool, ...]:
        """For each UNet call, whether it reuses deep features. SpecError if the bundle has no shallow UNet."""
        initial = round(self.model.defaults.full_share * len(evaluated))
        shallow = shallow_calls(request.cache_every, request.full_steps, initial, evaluated)
        if any(shallow) and SHALLOW_UNET not in self.model.components:
            name = "full_steps" if request.cache_every == 1 else "cache_every"
            raise SpecError(
                f"{name}: got {shown(getattr(request, name))}, but this bundle has no {SHALLOW_UNET}, which computes "
                "steps with cached features; build it with `ldm-export build CHECKPOINT -o BUNDLE --feature-cache 1`"
            )
        return shallow

    def _refuse_foreign_fields(self, request: Request) -> None:
        """Refuse fields of kinds of conditioning that the model does not have."""
        known = {name for conditioner in self.conditioners for name in conditioner.fields}
        if foreign := sorted((KINDS_FIELDS - known) & request.given()):
            takes = ", ".join(sorted(known)) or "count"
            raise SpecError(f"{foreign[0]}: got a value, but this {self.model.family} model takes {takes} instead")

    def _sides(self, request: Request) -> tuple[int, int]:
        """Height and width of the latents: decided by the conditioning, otherwise by the request."""
        asked = {"height": request.height, "width": request.width}
        sizes = [size for conditioner in self.conditioners if (size := conditioner.size(request)) is not None]
        if not sizes:
            height, width = (self.geometry.latents_of(side, pixels) for side, pixels in asked.items())
            return height, width
        for (side, pixels), latents in zip(asked.items(), sizes[0], strict=True):
            if pixels is not None and self.geometry.latents_of(side, pixels) != latents:
                decided = latents * self.geometry.factor
                raise SpecError(
                    f"{side}: got {pixels}, but the request's image leads to {decided}; leave {side} out, or resize it"
                )
        return sizes[0]

    def _images(self, request: Request) -> int:
        counts = [conditioner.images(request) for conditioner in self.conditioners]
        if request.count is not None and counts:
            raise SpecError("count: got a number, but this model's conditioning decides how many images there are")
        images = max(counts, default=integer("count", _or(request.count, 1), 1, MAX_COUNT))
        if images > self.geometry.images:
            raise SpecError(f"images: got {images} in one call, expected 1..{self.geometry.images}; make several calls")
        return images


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _check_memory(shape: tuple[int, int, int, int], geometry: Geometry) -> None:
    pixels = math.prod(shape[2:]) * geometry.factor**2
    values = shape[0] * max(math.prod(shape[1:]), pixels * geometry.image_channels)
    if values > MAX_VALUES:
        raise SpecError(
            f"size: got {shape[0]} images of {pixels} pixels, which are {values} values, expected at most "
            f"{MAX_VALUES}; make smaller images or several calls"
        )
