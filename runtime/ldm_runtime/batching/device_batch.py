"""A batch on a device: latents, conditioning and embeddings of its requests stay there from first to last step."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.call_rows import Span
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.member import Member
from ldm_runtime.denoiser import Denoiser, Tensors
from ldm_runtime.device import Call, Workspace, WorkspaceCache
from ldm_runtime.device_loop import GUIDED_STEP, STEP, DeviceLoop
from ldm_runtime.device_run import (
    COEFFICIENTS,
    HISTORY,
    NEXT_HISTORY,
    NEXT_SAMPLE,
    NOISE,
    coefficients,
    outputs_of,
    state_tensors,
)
from ldm_runtime.guidance import guide
from ldm_runtime.model import NOISE_PRED, SAMPLE, UNET
from ldm_runtime.schedulers.scaled_rows import scale_after, scaled, scaled_rows
from ldm_runtime.start import Start

__all__ = ["TABLE_CALLS", "DeviceBatch"]

F32 = NDArray[np.float32]
TABLE_CALLS = 64
"""Number of UNet calls whose embeddings are on the device for each image."""


class DeviceBatch:
    """A batch like ``batch.Batch`` on a device. Its requests have one image size, and are all guided or all unguided.

    An image has the same index in every tensor, and its unconditional row comes ``capacity`` rows before its
    conditional one. The capacity takes few different values; the device caches tensors and captured launches for each.
    A step is launched while the previous one still runs.

    Args:
        loop: The loop on the device, which takes the plans of all members.
        guided: True if the members are guided.
        denoiser: The pipeline's denoiser; only the names of the UNet's inputs are used.
        limits: ``max_rows`` and ``row_buckets``.
        noise_executor: Generates the noise of a step during the UNet call.
        workspaces: Keeps the tensors.
    """

    def __init__(
        self,
        loop: DeviceLoop,
        guided: bool,
        denoiser: Denoiser,
        limits: Limits,
        noise_executor: Executor,
        workspaces: WorkspaceCache,
    ):
        self._device, self._slots, self._denoiser, self._limits = loop.open(), loop.slots, denoiser, limits
        self._memory, self._step = self._device.memory, GUIDED_STEP if guided else STEP
        self._branches, self._noise_executor, self._workspaces = 1 + guided, noise_executor, workspaces
        self.members: list[Member] = []
        self._space: Workspace | None = None
        self._capacity = 0
        self._before: object = None

    @property
    def rows(self) -> int:
        """Reserved rows."""
        return self._branches * self._images

    @property
    def _images(self) -> int:
        return sum(member.plan.images for member in self.members)

    @property
    def space(self) -> Workspace:
        """The tensors of the batch."""
        assert self._space is not None
        return self._space

    def fits(self, job: Job) -> bool:
        """True if enough rows are free for the job."""
        return self.rows + job.plan.rows <= self._limits.max_rows

    def join(self, job: Job, conditioning: Tensors, schedule: Tensors, start: Start) -> None:
        """Add a job that fits, like ``Batch.join``, and copy its tensors to the device."""
        plan, place = job.plan, self._images
        latents = scaled(start.latents, scale_after(plan.trajectory, 0))
        scalars = coefficients(scaled_rows(plan.trajectory), self._slots, plan.guidance_scale)
        with self._memory.lock:
            self._resize(place + plan.images, plan.shape[1:], conditioning, schedule)
            for branch in range(self._branches):
                row, own = branch * self._capacity + place, slice(branch * plan.images, (branch + 1) * plan.images)
                self.space.write(SAMPLE, latents, row)
                for name, array in conditioning.items():
                    self.space.write(name, array[own], row)
            if self._slots > 1:
                shape = self.space.regions[HISTORY].shape[1:]
                self.space.write(HISTORY, np.zeros((plan.images, *shape), np.float32), place)
        span = Span(place, plan.images, place, plan.images)
        self.members.append(Member(job, start, schedule, scalars, span=span))

    def _resize(self, images: int, shape: Sequence[int], conditioning: Tensors, schedule: Tensors) -> None:
        """Move all images to tensors whose capacity fits ``images``."""
        capacity = self._padded(images)
        if capacity == self._capacity:
            return
        rows = self._branches * capacity
        unet = self._device.launchers[UNET].spec
        dtypes = {tensor.name: tensor.dtype for tensor in unet.inputs}
        tensors = state_tensors((capacity, *shape), rows, self._slots)
        for name, array in conditioning.items():
            tensors[name] = (rows, *array.shape[1:]), dtypes[name]
        for name, array in schedule.items():
            tensors[name] = (rows, *array.shape[1:]), dtypes[name]
            tensors[f"{name}.calls"] = (capacity, TABLE_CALLS, *array.shape[1:]), dtypes[name]
        tensors |= outputs_of(unet, tensors)
        calls = {name: Call(self._device.launchers[name], {}) for name in (UNET, self._step)}
        label = f"batch of {capacity} images in {rows} rows of {'×'.join(map(str, shape))}"
        key = (self._step, *sorted(tensors.items()))
        space = self._workspaces.get(key, lambda: Workspace(self._memory, tensors, calls, label))
        old, before = self._space, self._capacity
        self._space, self._capacity, space.in_use = space, capacity, True
        if old is not None:
            old.in_use = False
            kept = min(self._images, capacity)
            for name, start in self._rows_of_images(old, before):
                target = start // before * capacity
                self.space.copy(
                    old.regions[name].rows(start, start + kept), space.regions[name].rows(target, target + kept)
                )

    def _padded(self, images: int) -> int:
        """Capacity for a number of images: from the row buckets, otherwise the next power of two."""
        most = self._limits.max_rows // self._branches
        if self._limits.row_buckets is not None:
            return self._limits.padded(images * self._branches) // self._branches
        return min(most, 1 << (images - 1).bit_length())

    def _rows_of_images(self, space: Workspace, capacity: int) -> list[tuple[str, int]]:
        """Name and first row of each block whose rows are images; a UNet input of a guided batch has two blocks."""
        inputs = {SAMPLE, *self._denoiser.conditioning_inputs}
        tables = [name for name in space.regions if name.endswith(".calls") or name == HISTORY]
        return [(name, branch * capacity) for name in inputs for branch in range(self._branches)] + [
            (name, 0) for name in tables
        ]

    def leave(self, member: Member) -> F32:
        """Remove a member and return its latents, float32 [images, C, h, w]; the members behind it move up."""
        with self._memory.lock:
            start, images = member.span.image, member.span.images
            latents: F32 = self.space.read(SAMPLE, start, start + images)
            latents = scaled(latents, 1 / scale_after(member.trajectory, member.index))
            end = self._images
            for name, first in self._rows_of_images(self.space, self._capacity):
                region = self.space.regions[name]
                for row in range(first + start + images, first + end):
                    self.space.copy(region.rows(row, row + 1), region.rows(row - images, row - images + 1))
            place = self.members.index(member)
            del self.members[place]
            for other in self.members[place:]:
                moved = other.span.image - images
                other.span = Span(moved, other.span.rows, moved, other.span.images)
            if self.members:
                plan = self.members[0].plan
                inputs = {name: self.space.regions[name] for name in self._denoiser.conditioning_inputs}
                shaped = {name: np.empty((0, *region.shape[1:]), region.dtype) for name, region in inputs.items()}
                self._resize(self._images, plan.shape[1:], shaped, self.members[0].schedule)
            else:
                self.close()
        return latents

    def step(self, counters: Counters) -> None:
        """Launch one step of every member, then wait for the step before it.

        Raises:
            BackendError: The device failed.
        """
        noisy = [member for member in self.members if member.trajectory.needs_noise]
        drawing = self._noise_executor.submit(_draw, noisy, self._capacity) if noisy else None
        with self._memory.lock:
            space = self.space
            with counters.time("step"):
                self._select_embeddings()
                scalars = np.zeros(space.regions[COEFFICIENTS].shape, np.float32)
                for member in self.members:
                    scalars[member.span.image_slice] = member.rows[member.index]
                space.write(COEFFICIENTS, scalars)
                space.run(UNET)
            with counters.time("noise"):
                if drawing is not None:
                    space.write(NOISE, drawing.result())
            with counters.time("step"):
                for member in self.members:
                    if member.preview_due:
                        member.preview = self._preview(member)
                space.run(self._step)
                space.copy(space.regions[NEXT_SAMPLE], space.regions[SAMPLE])
                if self._slots > 1:
                    space.copy(space.regions[NEXT_HISTORY], space.regions[HISTORY])
                for member in self.members:
                    member.index += 1
            with counters.time("unet"):
                before, self._before = self._before, self._memory.mark()
                if before is not None:
                    self._memory.wait(before)
        counters.step(self.rows)

    def _select_embeddings(self) -> None:
        """Put each image's schedule inputs of its next UNet call into its rows."""
        for member in self.members:
            slot = member.index % TABLE_CALLS
            for name, array in member.schedule.items():
                if slot == 0:
                    own = array[member.index : member.index + TABLE_CALLS]
                    table = np.zeros((member.span.images, TABLE_CALLS, *array.shape[1:]), array.dtype)
                    table[:, : len(own)] = own
                    self.space.write(f"{name}.calls", table, member.span.image)
                region, tables = self.space.regions[name], self.space.regions[f"{name}.calls"]
                for image in range(member.span.image, member.span.image + member.span.images):
                    source = tables.rows(image, image + 1).address + slot * region.row_bytes
                    for branch in range(self._branches):
                        row = branch * self._capacity + image
                        self._memory.move(source, region.rows(row, row + 1).address, region.row_bytes)

    def _preview(self, member: Member) -> F32:
        """x0 as predicted at this step; waits for the UNet call."""
        start, stop = member.span.image, member.span.image + member.span.images
        latents: F32 = self.space.read(SAMPLE, start, stop)
        prediction: F32 = self.space.read(NOISE_PRED, start, stop)
        if self._branches == 2:
            conditional = self.space.read(NOISE_PRED, self._capacity + start, self._capacity + stop)
            prediction, _ = guide(prediction, conditional, np.float32(member.plan.guidance_scale))
        latents = scaled(latents, 1 / scale_after(member.trajectory, member.index))
        return member.trajectory.predict_x0(latents, prediction, member.index)

    def close(self) -> None:
        """Return the tensors to the cache."""
        if self._space is not None:
            self._space.in_use = False
        self._space, self._capacity = None, 0
        if self._before is not None:
            self._memory.wait(self._before)
            self._before = None


def _draw(members: Sequence[Member], capacity: int) -> F32:
    """Noise of each image, float32 [capacity, C, h, w]; zero for those that need none."""
    noise = np.zeros((capacity, *members[0].plan.shape[1:]), np.float32)
    for member in members:
        noise[member.span.image_slice] = next(member.start.noise)
    return noise
