"""The running requests: one batch per image size, prompt length, kind of loop and adapters. Batches take turns."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.batch import Batch
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.device_batch import DeviceBatch
from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.batching.limits import Limits
from ldm_runtime.batching.member import Member
from ldm_runtime.denoiser import Tensors
from ldm_runtime.device import WorkspaceCache
from ldm_runtime.errors import BackendError, LdmError, SpecError
from ldm_runtime.images import to_uint8
from ldm_runtime.loras.selection import Selection
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.start import Start

__all__ = ["ActiveBatches", "Notify"]

F32 = NDArray[np.float32]
PIXELS_PER_DECODE = 2**18
"""Maximum pixels per decoder call on a CPU, those of one 512×512 image: larger calls save no time there."""
_log = logging.getLogger(__name__)


class _Key(NamedTuple):
    """What the requests of a batch have in common.

    Attributes:
        size: Height and width of the latents, and number of prompt chunks.
        guided: True for a guided and False for an unguided batch on the device, None for a batch in NumPy.
        loras: Adapters that change the weights.
    """

    size: tuple[int, ...]
    guided: bool | None
    loras: Selection


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
        self._batches: dict[_Key, Batch | DeviceBatch] = {}
        self._workspaces = WorkspaceCache()
        self._turn = 0
        self.unhealthy = False
        """True after a failure of the engine, until the scheduler has generated a test image and resets it."""

    def __len__(self) -> int:
        return sum(len(batch.members) for batch in list(self._batches.values()))

    def fits(self, job: Job) -> bool:
        """True if the job can join now."""
        batch, loras = self._batches.get(self._key(job)), job.plan.loras
        if batch is not None:
            return batch.fits(job)
        sizes = {key.size for key in self._batches} | {_size(job)}
        selections = {key.loras for key in self._batches if key.loras} | ({loras} if loras else set())
        return len(sizes) <= self._limits.max_sizes and len(selections) <= self._pipeline.most_loras

    def _key(self, job: Job) -> _Key:
        """Key of the batch that a job joins: its sizes, and whether a batch on the device can run its plan."""
        loop, plan = self._pipeline.loop, job.plan
        on_device = loop is not None and loop.takes(plan) and not plan.caches and not plan.loras
        return _Key(_size(job), plan.guided if on_device else None, plan.loras)

    def _new_batch(self, pipeline: LatentDiffusionPipeline, guided: bool | None) -> Batch | DeviceBatch:
        if guided is None or pipeline.loop is None:
            return Batch(pipeline.denoiser, self._limits, self._noise_executor)
        return DeviceBatch(
            pipeline.loop, guided, pipeline.denoiser, self._limits, self._noise_executor, self._workspaces
        )

    def join(self, job: Job) -> None:
        """Encode the job's conditioning and add it to the batch of its size; it must fit."""
        job.started = time.monotonic()
        try:
            for member in chain.from_iterable(batch.members[:1] for batch in self._batches.values()):
                self._pipeline.with_loras(member.plan)  # adapters that are in use are not freed for those of the job
            with self._counters.time("encode"):
                pipeline = self._pipeline.with_loras(job.plan)
                start = pipeline.begin(job.plan)
                conditioning, schedule = pipeline.condition(job.plan, start), self._embed(job, pipeline)
            job.encoded = time.monotonic()
            with self._counters.time("step"):
                while not self._enter(job, conditioning, schedule, start):
                    pass
        except BaseException as error:
            self._fail([job], error)

    def _enter(self, job: Job, conditioning: Tensors, schedule: Tensors, start: Start) -> bool:
        """Add a job to its batch. Return False if the loop on the device could not start and was replaced."""
        key, loop = self._key(job), self._pipeline.loop
        try:
            if key not in self._batches:
                self._batches[key] = self._new_batch(self._pipeline.with_loras(job.plan), key.guided)
            self._batches[key].join(job, conditioning, schedule, start)
        except BackendError as error:
            if key.guided is None or loop is None:
                raise
            self._pipeline.loop_failed(loop, error)
            for empty in [other for other, batch in self._batches.items() if not batch.members]:
                self._batches.pop(empty).close()
            self._workspaces.close()
            return False
        if key.guided is not None and loop is not None:
            self._pipeline.loop_started(loop)
        return True

    def _embed(self, job: Job, pipeline: LatentDiffusionPipeline) -> Tensors:
        """The UNet's schedule inputs at each step; jobs with equal timesteps and adapters share them."""
        timesteps = job.plan.trajectory.timesteps
        for key, batch in self._batches.items():
            for member in batch.members:
                if key.loras == job.plan.loras and np.array_equal(member.trajectory.timesteps, timesteps):
                    return member.schedule
        return pipeline.denoiser.embed(timesteps)

    def remove_stopped(self) -> None:
        """Remove the jobs that are cancelled or past their deadline."""
        now = time.monotonic()
        for batch in list(self._batches.values()):
            stopped = [(member, reason) for member in batch.members if (reason := member.job.stop_reason(now))]
            try:
                for member, reason in stopped:
                    batch.leave(member)
                    self._notify(member.job, reason)
            except BaseException as error:
                self._give_up(batch, [member.job for member in batch.members], error)
        self._batches = {key: batch for key, batch in self._batches.items() if batch.members}

    def step(self) -> None:
        """Run one step of one batch, then decode the jobs that are done."""
        if not self._batches:
            return
        self._turn += 1
        batch = list(self._batches.values())[self._turn % len(self._batches)]
        jobs = [member.job for member in batch.members]
        try:
            batch.step(self._counters)
            done = [(member, batch.leave(member)) for member in list(batch.members) if member.done]
        except BaseException as error:
            self._give_up(batch, jobs, error)
            return
        for member in (*(member for member, _ in done), *batch.members):
            if member.job.on_progress is not None:
                self._report(member)
        for member, _ in done:
            member.job.sampled = time.monotonic()
        self._finish([(member.job, latents) for member, latents in done])

    def _give_up(self, batch: Batch | DeviceBatch, jobs: Sequence[Job], error: BaseException) -> None:
        """End a batch that has failed, and its jobs with the error."""
        self._batches = {key: other for key, other in self._batches.items() if other is not batch}
        with suppress(BackendError):
            batch.close()
        self._fail(jobs, error)

    def abandon(self, reason: LdmError) -> None:
        """End all jobs with an error."""
        for batch in self._batches.values():
            batch.close()
            for member in batch.members:
                self._notify(member.job, reason)
        self._batches = {}
        self._workspaces.close()

    def _report(self, member: Member) -> None:
        preview = None
        if member.preview is not None:
            with suppress(SpecError), self._counters.time("decode"):  # skip a preview that cannot be decoded
                preview, _ = self._completed(member.job, self._pipeline.decode_array(member.preview))
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
            for (job, _), (own, flagged) in zip(group, images, strict=True):
                started = job.started or job.submitted
                waiting, running = started - job.submitted, time.monotonic() - started
                self._notify(job, JobResult(own, job.plan.seeds, waiting, running, flagged))

    def _jobs_per_decode(self, latents: Sequence[F32]) -> int:
        """Number of leading jobs that are decoded in one call, at least one."""
        geometry = self._pipeline.geometry
        pixels = math.prod(latents[0].shape[2:]) * geometry.factor**2
        most = geometry.images
        if not self._pipeline.decodes_together(latents[0]):
            most = min(most, PIXELS_PER_DECODE // pixels)
        return max(1, sum(total <= most for total in accumulate(map(len, latents))))

    def _completed(self, job: Job, decoded: F32) -> tuple[NDArray[np.uint8], tuple[bool, ...] | None]:
        images, flagged = self._pipeline.finish(job.plan.request, decoded)
        return np.ascontiguousarray(to_uint8(images)), flagged

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        """End jobs with an error. Any error but ``SpecError`` marks the engine unhealthy."""
        if not isinstance(error, SpecError):
            self.unhealthy = True
            _log.error("%d requests failed: %s: %s", len(jobs), type(error).__name__, error)
        if not isinstance(error, LdmError):
            error = BackendError(f"batch scheduler: {type(error).__name__}: {error}")
        for job in jobs:
            self._notify(job, error)


def _size(job: Job) -> tuple[int, ...]:
    """Sizes that all rows of a UNet call share: height and width of the latents, and prompt chunks."""
    return *job.plan.shape[2:], job.plan.request.prompt_chunks
