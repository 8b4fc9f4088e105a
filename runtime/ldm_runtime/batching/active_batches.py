"""The running requests: one batch per image size; the batches take turns, one step each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.batch import Batch, Member
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.batching.limits import Limits
from ldm_runtime.denoiser import Tensors
from ldm_runtime.errors import BackendError, LdmError, SpecError
from ldm_runtime.images import to_uint8
from ldm_runtime.pipeline import LatentDiffusionPipeline

__all__ = ["ActiveBatches", "Notify"]

F32 = NDArray[np.float32]
PIXELS_PER_DECODE = 2**18
"""Pixels that are decoded in one call, as many as one image of 512×512 has: more need more memory and save no time."""
_log = logging.getLogger(__name__)
Notify = Callable[[Job, Progress | JobResult | LdmError], None]


class ActiveBatches:
    """Runs jobs from their first step to their images; every job that joins ends with exactly one result or error.

    Args:
        pipeline: Encodes, denoises and decodes.
        limits: Limits on rows and image sizes.
        counters: Counts the work.
        noise_executor: Generates noise during UNet calls.
        notify: Receives the progress and the result of each job.
    """

    def __init__(
        self,
        pipeline: LatentDiffusionPipeline,
        limits: Limits,
        counters: Counters,
        noise_executor: Executor,
        notify: Notify,
    ) -> None:
        self._pipeline, self._limits, self._counters = pipeline, limits, counters
        self._noise_executor, self._notify = noise_executor, notify
        self._batches: dict[tuple[int, ...], Batch] = {}
        self._turn = 0
        self.unhealthy = False
        """True after a failure of the engine, until the scheduler has generated a test image and resets it."""

    def __len__(self) -> int:
        return sum(len(batch.members) for batch in list(self._batches.values()))

    def fits(self, job: Job) -> bool:
        """True if the job can join now."""
        batch = self._batches.get(job.plan.shape[2:])
        return len(self._batches) < self._limits.max_sizes if batch is None else batch.fits(job)

    def join(self, job: Job) -> None:
        """Encode the job's conditioning and add it to the batch of its size; it must fit."""
        job.started = time.monotonic()
        try:
            with self._counters.time("encode"):
                conditioning, schedule = self._pipeline.condition(job.plan), self._embed(job)
            with self._counters.time("step"):
                size = job.plan.shape[2:]
                if size not in self._batches:
                    self._batches[size] = Batch(self._pipeline.denoiser, self._limits, self._noise_executor)
                self._batches[size].join(job, conditioning, schedule)
        except BaseException as error:
            self._fail([job], error)

    def _embed(self, job: Job) -> Tensors:
        """The UNet's schedule inputs at each step; jobs with equal timesteps share them."""
        timesteps = job.plan.trajectory.timesteps
        for batch in self._batches.values():
            for member in batch.members:
                if np.array_equal(member.trajectory.timesteps, timesteps):
                    return member.schedule
        return self._pipeline.denoiser.embed(timesteps)

    def remove_stopped(self) -> None:
        """Remove the jobs that are cancelled or past their deadline."""
        now = time.monotonic()
        for batch in self._batches.values():
            for member in list(batch.members):
                if (reason := member.job.stop_reason(now)) is not None:
                    batch.leave(member)
                    self._notify(member.job, reason)
        self._batches = {size: batch for size, batch in self._batches.items() if batch.members}

    def step(self) -> None:
        """Run one step of one batch, then decode the jobs that are done."""
        if not self._batches:
            return
        self._turn += 1
        batch = list(self._batches.values())[self._turn % len(self._batches)]
        try:
            batch.step(self._counters)
        except BaseException as error:
            self._batches = {size: other for size, other in self._batches.items() if other is not batch}
            self._fail([member.job for member in batch.members], error)
            return
        for member in batch.members:
            if member.job.on_progress is not None:
                self._report(member)
        self._finish([(member.job, batch.leave(member)) for member in list(batch.members) if member.done])

    def abandon(self, reason: LdmError) -> None:
        """End all jobs with an error."""
        for batch in self._batches.values():
            for member in batch.members:
                self._notify(member.job, reason)
        self._batches = {}

    def _report(self, member: Member) -> None:
        preview = None
        if member.preview is not None:
            with suppress(SpecError), self._counters.time("decode"):  # a preview that cannot be decoded is left out
                preview = self._completed(member.job, self._pipeline.decode_array(member.preview))
            member.preview = None
        self._notify(member.job, Progress(member.index - 1, len(member.trajectory), preview))

    def _finish(self, done: Sequence[tuple[Job, F32]]) -> None:
        """Decode finished jobs, small images together; if a call fails, decode each of its jobs alone."""
        undecoded = list(done)
        while undecoded:
            count = self._jobs_per_decode([latents for _, latents in undecoded])
            group, undecoded = undecoded[:count], undecoded[count:]
            try:
                with self._counters.time("decode"):
                    decoded = self._pipeline.decode_array(np.concatenate([latents for _, latents in group]))
                    starts = [0, *accumulate(len(latents) for _, latents in group)]
                    parts = [decoded[start:end] for start, end in pairwise(starts)]
                    images = [self._completed(job, part) for (job, _), part in zip(group, parts, strict=True)]
            except BaseException as error:
                if count > 1:
                    for single in group:
                        self._finish([single])
                else:
                    self._fail([group[0][0]], error)
                continue
            for (job, _), own in zip(group, images, strict=True):
                started = job.started or job.submitted
                waiting, running = started - job.submitted, time.monotonic() - started
                self._notify(job, JobResult(own, job.plan.seeds, waiting, running))

    def _jobs_per_decode(self, latents: Sequence[F32]) -> int:
        """Number of jobs, from the first on, that are decoded in one call; at least one."""
        geometry = self._pipeline.geometry
        pixels = math.prod(latents[0].shape[2:]) * geometry.factor**2
        most = min(geometry.images, PIXELS_PER_DECODE // pixels)
        return max(1, sum(total <= most for total in accumulate(map(len, latents))))

    def _completed(self, job: Job, decoded: F32) -> NDArray[np.uint8]:
        return np.ascontiguousarray(to_uint8(self._pipeline.finish(job.plan.request, decoded)))

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        """End jobs with an error. A ``SpecError`` is the request's own; any other error marks the engine unhealthy."""
        if not isinstance(error, SpecError):
            self.unhealthy = True
            _log.error("%d requests failed: %s: %s", len(jobs), type(error).__name__, error)
        if not isinstance(error, LdmError):
            error = BackendError(f"batch scheduler: {type(error).__name__}: {error}")
        for job in jobs:
            self._notify(job, error)
