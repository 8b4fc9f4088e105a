"""The requests of one picture size that run together: the rows of one UNet call, and a DDIM step of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job
from ldm_runtime.denoiser import Conditioning, UNet

F32 = NDArray[np.float32]


@dataclass(eq=False)
class Member:
    """A running ticket: its noise, the next step, and the span of its rows and images in the batch's arrays."""

    ticket: Job
    noise: Iterator[F32]
    index: int = 0
    rows: slice = field(default_factory=lambda: slice(0))
    images: slice = field(default_factory=lambda: slice(0))
    foreseen: F32 | None = None
    """x_0 as predicted in the last step, where a preview is due."""

    @property
    def done(self) -> bool:
        """True after the last step."""
        return self.index == len(self.ticket.schedule.timesteps)


class Batch:
    """Members join between any two steps and leave when done: the UNet takes one timestep per row.

    A member's rows lie side by side, those of the unguided branch first, as in a pipeline's own call. What is constant
    over its steps is copied in when it joins; a gap that a leaving member makes is closed by the last one, or by moving
    up those behind it.

    Args:
        unet: predicts the noise of the rows.
        most: rows of one call.
        sizes: rows a call may have, rising and ending with ``most``, for engines that like few shapes: calls are filled
            up to the next of them. None: as many as there are.
        drawer: draws the noise of a step while the UNet runs.
    """

    def __init__(self, unet: UNet, most: int, sizes: Sequence[int] | None, drawer: Executor):
        self._unet, self._most, self._sizes, self._drawer = unet, most, sizes, drawer
        self.members: list[Member] = []
        self._conditioning: dict[str, NDArray[Any]] = {}
        self._latents = self._sample = np.empty((0, 0, 0, 0), np.float32)
        self._times = np.zeros(most, np.int64)
        self._index()

    @property
    def rows(self) -> int:
        """Rows in use."""
        return sum(member.ticket.rows for member in self.members)

    def fits(self, ticket: Job) -> bool:
        """True where there is room for its rows."""
        return self.rows + ticket.rows <= self._most

    def join(self, ticket: Job, conditioning: Conditioning) -> None:
        """Let it run from the next step on; ``conditioning`` has its rows, with guidance the unguided ones first."""
        noise = ticket.plan.noise()
        latents = next(noise) if ticket.plan.latents is None else ticket.plan.latents
        if not self._conditioning:
            self._latents = np.zeros((self._most, *latents.shape[1:]), np.float32)
            self._sample = np.zeros_like(self._latents)
            self._conditioning = {
                name: np.zeros((self._most, *array.shape[1:]), array.dtype) for name, array in conditioning.items()
            }
        self.members.append(member := Member(ticket, noise))
        self._index()
        for name, array in conditioning.items():
            self._conditioning[name][member.rows] = array
        self._latents[member.images] = latents

    def leave(self, member: Member) -> F32:
        """Take a member out and give its latents [images, C, h, w]."""
        latents = self._latents[member.images].copy()
        place = self.members.index(member)
        last = self.members[-1]
        alike = (last.ticket.rows, last.images.stop - last.images.start) == (member.ticket.rows, len(latents))
        moved = [last] if alike and last is not member else self.members[place + 1 :]
        before = [(other, other.rows, other.images) for other in moved]
        if alike:
            self.members[place] = last
            self.members.pop()
        else:
            del self.members[place]
        self._index()
        for other, rows, images in before:
            for array in self._conditioning.values():
                array[other.rows] = array[rows]
            self._latents[other.images] = self._latents[images]
        return latents

    def _index(self) -> None:
        """Places of all members, and which rows and images belong together."""
        row = image = 0
        image_of_row, prompted, guided, unguided = list[int](), list[int](), list[int](), list[int]()
        for member in self.members:
            count = member.ticket.plan.shape[0]
            images = range(image, image + count)
            if member.ticket.plan.guided:
                guided += images
                unguided += range(row, row + count)
                image_of_row += images
            image_of_row += images
            prompted += range(row + member.ticket.rows - count, row + member.ticket.rows)
            member.rows, member.images = slice(row, row + member.ticket.rows), slice(image, image + count)
            row, image = member.rows.stop, member.images.stop
        self._image_of_row, self._prompted = np.array(image_of_row, np.intp), np.array(prompted, np.intp)
        self._guided, self._unguided = np.array(guided, np.intp), np.array(unguided, np.intp)
        counts = [member.ticket.plan.shape[0] for member in self.members]
        self._member_of_image = np.repeat(np.arange(len(counts)), counts)
        scales = np.array([member.ticket.plan.guidance_scale for member in self.members], np.float32)
        self._scales = _column(scales[self._member_of_image[self._guided]])
        noisy = [member.ticket.schedule.needs_noise for member in self.members]
        self._noisy = np.flatnonzero(np.array(noisy, bool)[self._member_of_image])

    def step(self, tally: Counters) -> None:
        """One step of every member: a UNet call, guidance, and DDIM; the same arithmetic as a pipeline's.

        Raises:
            BackendError: the UNet failed; the members are as before, but for the noise they have drawn.
        """
        with tally.time("step"):
            rows, latents = len(self._image_of_row), self._latents[: len(self._prompted)]
            padded = rows if self._sizes is None else next(size for size in self._sizes if size >= rows)
            times = np.array([member.ticket.schedule.timesteps[member.index] for member in self.members], np.int64)
            np.take(times[self._member_of_image], self._image_of_row, out=self._times[:rows])
            np.take(latents, self._image_of_row, axis=0, out=self._sample[:rows])
            conditioning = {name: array[:padded] for name, array in self._conditioning.items()}
            drawing = self._drawer.submit(self._draw) if len(self._noisy) else None
        with tally.time("unet"):
            predicted = self._unet(self._sample[:padded], self._times[:padded], conditioning)
        with tally.time("noise"):
            noise = drawing.result() if drawing else None
        with tally.time("step"):
            self._advance(latents, self._guide(predicted), noise)
        tally.step(rows)

    def _draw(self) -> F32:
        """Noise of the images that need some, in their order."""
        return np.concatenate([next(member.noise) for member in self.members if member.ticket.schedule.needs_noise])

    def _guide(self, predicted: F32) -> F32:
        output: F32 = predicted[self._prompted]
        if len(self._guided):
            unguided = predicted[self._unguided]
            output[self._guided] = unguided + self._scales * (output[self._guided] - unguided)
        return output

    def _advance(self, latents: F32, output: F32, noise: F32 | None) -> None:
        for member in self.members:
            every, schedule = member.ticket.preview_every, member.ticket.schedule
            if every and (member.index + 1) % every == 0 and member.index + 1 < len(schedule.timesteps):
                member.foreseen = schedule.predicted(latents[member.images], output[member.images], member.index)
        if self.members[0].ticket.schedule.affine:  # all are of one scheduler
            rows = np.stack([member.ticket.coefficients[member.index] for member in self.members])
            a, b, c = (_column(numbers) for numbers in rows[self._member_of_image].T)
            latents *= a
            output *= b
            latents += output
            if noise is not None:
                latents[self._noisy] += c[self._noisy] * noise
        else:
            drawn = iter(() if noise is None else noise)
            for member in self.members:
                schedule, x = member.ticket.schedule, latents[member.images]
                own = np.stack([next(drawn) for _ in x]) if schedule.needs_noise else None
                x[:] = schedule.step(x, output[member.images], member.index, own)
        for member in self.members:
            member.index += 1


def _column(numbers: F32) -> F32:
    return numbers.reshape(-1, 1, 1, 1)
