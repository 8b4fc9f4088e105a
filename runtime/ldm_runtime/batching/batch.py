"""A batch: requests of one image size that are denoised together, with one UNet call per step.

If some members reuse deep features at a step, they share a second UNet call.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.call_rows import Call, CallRows, Span, call_rows
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.member import Member
from ldm_runtime.batching.state import BatchState
from ldm_runtime.denoiser import Denoiser, Tensors
from ldm_runtime.feature_cache import DeepFeatures
from ldm_runtime.guidance import StepBranches, guide, rescale
from ldm_runtime.plan import Plan
from ldm_runtime.schedulers.trajectory import padded_rows
from ldm_runtime.start import Start

__all__ = ["Batch"]

F32 = NDArray[np.float32]
MAX_LAYOUTS = 64
"""Maximum number of cached layouts of UNet calls for one set of members."""


class Batch:
    """Requests that are denoised together. Members join and leave between any two steps.

    This works because the UNet takes one timestep per row. A member reserves ``Plan.rows`` rows from its first step to
    its last. Conditioning is copied in when it joins. When a member leaves, the last member of equal size takes its
    place, or the members behind it move up.

    Args:
        denoiser: Predicts the noise of the rows.
        limits: ``max_rows`` and ``row_buckets``.
        noise_executor: Generates the noise of a step during the UNet call.
    """

    def __init__(self, denoiser: Denoiser, limits: Limits, noise_executor: Executor):
        self._denoiser, self._limits, self._noise_executor = denoiser, limits, noise_executor
        self.members: list[Member] = []
        self._state: BatchState | None = None
        self._conditioning: Tensors = {}
        self._features = DeepFeatures(denoiser, limits.max_rows)
        self._sample: F32 = np.empty(0, np.float32)
        self._noise: F32 = self._sample
        self._direction: F32 = self._sample
        self._arrange()

    @property
    def rows(self) -> int:
        """Reserved rows."""
        return sum(member.plan.rows for member in self.members)

    def fits(self, job: Job) -> bool:
        """True if enough rows are free for the job."""
        return self.rows + job.plan.rows <= self._limits.max_rows

    def join(self, job: Job, conditioning: Tensors, schedule: Tensors, start: Start) -> None:
        """Add a job that fits; it takes part in the next step.

        Args:
            job: The request.
            conditioning: The UNet's conditioning inputs, [plan.rows, …], as ``LatentDiffusionPipeline.condition``.
            schedule: The UNet's schedule inputs, [calls, …], as ``Denoiser.embed``.
            start: As ``LatentDiffusionPipeline.begin``.
        """
        if self._state is None:
            self._state = self._allocate(job.plan, conditioning)
        self.members.append(member := Member(job, start, schedule, job.plan.trajectory.rows))
        self._arrange()
        for name, array in conditioning.items():
            self._conditioning[name][member.span.row_slice] = array
        self._state.put(member.span.image_slice, job.plan.trajectory.start(start.latents))
        self._direction[member.span.image_slice] = 0
        for other in self.members:
            other.rows = padded_rows(other.trajectory.rows, self._state.slots)

    def _allocate(self, plan: Plan, conditioning: Tensors) -> BatchState:
        rows = self._limits.max_rows
        self._conditioning = {name: np.zeros((rows, *a.shape[1:]), a.dtype) for name, a in conditioning.items()}
        self._sample, self._noise, self._direction = (np.zeros((rows, *plan.shape[1:]), np.float32) for _ in range(3))
        return BatchState(rows, plan.shape[1:])

    def leave(self, member: Member) -> F32:
        """Remove a member and return its latents, float32 [images, C, h, w]."""
        assert self._state is not None
        latents = self._state.latents[member.span.image_slice].copy()
        place, last = self.members.index(member), self.members[-1]
        alike = (last.span.rows, last.span.images) == (member.span.rows, member.span.images)
        moved = [last] if alike and last is not member else self.members[place + 1 :]
        before = [(other, other.span) for other in moved]
        if alike:
            self.members[place] = last
            self.members.pop()
        else:
            del self.members[place]
        self._arrange()
        for other, old in before:
            for array in self._conditioning.values():
                array[other.span.row_slice] = array[old.row_slice]
            self._features.move(old.row_slice, other.span.row_slice)
            self._state.move(old.image_slice, other.span.image_slice)
            self._direction[other.span.image_slice] = self._direction[old.image_slice]
        return latents

    def close(self) -> None:
        """Nothing to free: the arrays belong to the batch."""

    def _arrange(self) -> None:
        """Assign a place to every member, and compute the arrays that stay constant until a member joins or leaves."""
        row = image = 0
        for member in self.members:
            member.span = Span(row, member.plan.rows, image, member.plan.images)
            row, image = row + member.plan.rows, image + member.plan.images
        self._images = image
        self._layouts: dict[tuple[tuple[StepBranches, bool], ...], CallRows] = {}
        counts = [member.plan.images for member in self.members]
        self._member_of_image = np.repeat(np.arange(len(counts)), counts)
        scales = [member.plan.guidance_scale for member in self.members]
        self._scales = self._of_images(np.array(scales, np.float32))
        self._extra_scales = self._of_images(np.array([scale - 1 for scale in scales], np.float32))
        self._rescales = self._of_images(
            np.array([member.plan.guidance_rescale for member in self.members], np.float32)
        )
        self._noisy = [member for member in self.members if member.trajectory.needs_noise]
        self._caching = any(member.plan.caches for member in self.members)
        self._reusing = any(StepBranches.REUSED in member.plan.steps for member in self.members)
        self._affine = all(member.trajectory.affine for member in self.members)
        self._scaled = any((member.trajectory.input_scale != 1).any() for member in self.members)

    def _of_images(self, values: F32) -> F32:
        """Repeat one number per member for each of its images: float32 [images, 1, 1, 1]."""
        return values[self._member_of_image].reshape(-1, 1, 1, 1)

    def step(self, counters: Counters) -> None:
        """Advance every member by one step, with the same arithmetic as the pipeline's loop.

        Raises:
            BackendError: The UNet failed. The members are unchanged, except that they have drawn noise.
        """
        assert self._state is not None
        with counters.time("step"):
            layout = self._layout()
            latents = self._state.latents[: self._images]
            model_input = self._model_input(latents)
            schedule = {
                name: np.stack([member.schedule[name][member.index] for member in self.members])
                for name in self.members[0].schedule
            }
            drawing = self._noise_executor.submit(self._draw) if self._noisy else None
        parts = [self._predict(call, model_input, schedule, counters) for call in layout.calls]
        predicted = parts[0] if len(parts) == 1 else np.concatenate(parts)
        with counters.time("noise"):
            if drawing is not None:
                drawing.result()
        with counters.time("step"):
            output = self._guide(predicted, layout)
            for member in self.members:
                if member.preview_due:
                    images = member.span.image_slice
                    member.preview = member.trajectory.predict_x0(latents[images], output[images], member.index)
            self._advance(self._state, output)

    def _predict(self, call: Call, model_input: F32, schedule: Tensors, counters: Counters) -> F32:
        """The predictions of the rows that a call uses, float32 [used, C, h, w]."""
        with counters.time("step"):
            sample = np.take(model_input, call.image, 0, self._sample[: len(call.image)], "clip")
            schedule = {name: array[call.member] for name, array in schedule.items()}
            conditioning = {name: array[call.conditioning] for name, array in self._conditioning.items()}
        with counters.time("unet"):
            predicted = self._features.predict(
                sample, schedule, conditioning, call.rows, shallow=call.shallow, keep=self._caching
            )
        counters.step(call.used)
        return predicted[: call.used]

    def _layout(self) -> CallRows:
        evaluated = tuple(
            (member.plan.steps[member.index], member.plan.shallow[member.index]) for member in self.members
        )
        if evaluated not in self._layouts:
            if len(self._layouts) == MAX_LAYOUTS:
                self._layouts.clear()
            spans, limits = [member.span for member in self.members], self._limits
            self._layouts[evaluated] = call_rows(spans, evaluated, limits.padded, limits.max_rows)
        return self._layouts[evaluated]

    def _model_input(self, latents: F32) -> F32:
        if not self._scaled:
            return latents
        scales = [member.trajectory.input_scale[member.index] for member in self.members]
        return latents * self._of_images(np.array(scales, np.float32))

    def _draw(self) -> None:
        for member in self._noisy:
            self._noise[member.span.image_slice] = next(member.start.noise)

    def _guide(self, predicted: F32, call: CallRows) -> F32:
        """Combine the branches; returns the prediction of each image, float32 [images, C, h, w]."""
        output: F32 = predicted[call.conditional]
        if every := len(call.guided) == self._images:
            output, direction = guide(predicted[call.unconditional], output, self._scales)
        elif len(call.guided):
            scales = self._scales[call.guided]
            output[call.guided], direction = guide(predicted[call.unconditional], output[call.guided], scales)
        if self._reusing and (every or len(call.guided)):
            self._direction[call.guided] = direction
        if len(call.reused):
            output[call.reused] += self._extra_scales[call.reused] * self._direction[call.reused]
        if self._rescales.any():
            guided = np.concatenate([call.guided, call.reused])
            chosen = guided[self._rescales[guided].ravel() != 0]
            if len(chosen):
                conditional = predicted[call.conditional[chosen]]
                output[chosen] = rescale(output[chosen], conditional, self._rescales[chosen])
        return output

    def _advance(self, state: BatchState, output: F32) -> None:
        if self._affine:
            rows = np.stack([member.rows[member.index] for member in self.members])
            state.advance(rows[self._member_of_image], output, self._noise[: self._images])
        else:
            for member in self.members:
                images, trajectory = member.span.image_slice, member.trajectory
                noise = self._noise[images] if trajectory.needs_noise else None
                own = state.get(images, trajectory.slots)
                state.put(images, trajectory.step(own, output[images], member.index, noise))
        for member in self.members:
            member.index += 1
            if member.start.kept is not None:
                images, trajectory = member.span.image_slice, member.trajectory
                state.latents[images] = member.start.kept.blend(state.latents[images], trajectory, member.index)
