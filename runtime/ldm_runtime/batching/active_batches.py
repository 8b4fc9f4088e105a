"""The requests in work: a batch for each picture size, which take turns at a step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ldm_runtime.batching.batch import F32, Batch, Member
from ldm_runtime.batching.counters import Counters
from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.batching.limits import Limits
from ldm_runtime.errors import BackendError, LdmError, SpecError
from ldm_runtime.images import to_uint8
from ldm_runtime.pipeline import LatentDiffusionPipeline

PIXELS_AT_ONCE = 2**18
"""Pixels that are decoded together, as many as one picture of 512×512 has: more take more memory, not less time."""
_log = logging.getLogger(__name__)
Tell = Callable[[Job, Progress | JobResult | LdmError], None]


class ActiveBatches:
    """Takes tickets from their first step to their pictures; every one that joins is told one outcome.

    Args:
        pipeline: what encodes, denoises and decodes.
        limits: of rows and of sizes at once.
        tally: where it counts.
        drawer: draws noise beside the UNet.
        tell: takes each progress and outcome.
    """

    def __init__(
        self, pipeline: LatentDiffusionPipeline, limits: Limits, tally: Counters, drawer: Executor, tell: Tell
    ) -> None:
        self._pipeline, self._limits, self._tally, self._drawer = pipeline, limits, tally, drawer
        self._tell = tell
        self._batches: dict[tuple[int, int], Batch] = {}
        self._turn = 0
        self.broken = False
        """True from a failure of the engine on, until someone has seen a picture made and sets it back."""

    def __len__(self) -> int:
        return sum(len(batch.members) for batch in list(self._batches.values()))

    def fits(self, ticket: Job) -> bool:
        """True where it could join now."""
        batch = self._batches.get(ticket.plan.shape[2:])
        return len(self._batches) < self._limits.heights_and_widths if batch is None else batch.fits(ticket)

    def join(self, ticket: Job) -> None:
        """Encode its prompts and let it run from the next step on; it must fit."""
        ticket.begun = time.monotonic()
        try:
            with self._tally.time("encode"):
                conditioning = self._pipeline.unet.encode(self._pipeline.context(ticket.plan))
            with self._tally.time("step"):
                size, limits = ticket.plan.shape[2:], self._limits
                if size not in self._batches:
                    self._batches[size] = Batch(self._pipeline.unet, limits.rows, limits.call_rows, self._drawer)
                self._batches[size].join(ticket, conditioning)
        except Exception as error:
            self._failed([ticket], error)

    def sweep(self) -> None:
        """Take out those that are cancelled or overdue."""
        now = time.monotonic()
        for batch in self._batches.values():
            for member in list(batch.members):
                if (reason := member.ticket.stopped(now)) is not None:
                    batch.leave(member)
                    self._tell(member.ticket, reason)
        self._batches = {size: batch for size, batch in self._batches.items() if batch.members}

    def step(self) -> None:
        """One step of one size's requests; those that are done are decoded."""
        if not self._batches:
            return
        self._turn += 1
        batch = list(self._batches.values())[self._turn % len(self._batches)]
        try:
            batch.step(self._tally)
        except Exception as error:
            self._batches = {size: other for size, other in self._batches.items() if other is not batch}
            self._failed([member.ticket for member in batch.members], error)
            return
        for member in batch.members:
            if member.ticket.progress is not None:
                self._progress(member)
        self._finish([(member.ticket, batch.leave(member)) for member in list(batch.members) if member.done])

    def abandon(self, reason: LdmError) -> None:
        """End all of them."""
        for batch in self._batches.values():
            for member in batch.members:
                self._tell(member.ticket, reason)
        self._batches = {}

    def _progress(self, member: Member) -> None:
        preview = None
        if member.foreseen is not None:
            with suppress(SpecError), self._tally.time("decode"):  # one that cannot be shown is left out
                preview = self._images(member.foreseen)
            member.foreseen = None
        self._tell(member.ticket, Progress(member.index - 1, len(member.ticket.schedule.timesteps), preview))

    def _finish(self, done: Sequence[tuple[Job, F32]]) -> None:
        """Decode those that are done, small ones together; where that fails, each alone."""
        left = list(done)
        while left:
            count = self._decoded_at_once([latents for _, latents in left])
            group, left = left[:count], left[count:]
            try:
                with self._tally.time("decode"):
                    images = self._images(np.concatenate([latents for _, latents in group]))
            except Exception as error:
                if count > 1:
                    for alone in group:
                        self._finish([alone])
                else:
                    self._failed([group[0][0]], error)
                continue
            for ticket, latents in group:
                own, images = images[: len(latents)], images[len(latents) :]
                begun = ticket.begun or ticket.submitted
                worked = time.monotonic() - begun
                self._tell(ticket, JobResult(own, ticket.plan.seeds, begun - ticket.submitted, worked))

    def _decoded_at_once(self, latents: Sequence[F32]) -> int:
        """How many of them, from the first on: at least one."""
        geometry = self._pipeline.geometry
        room = min(geometry.images, PIXELS_AT_ONCE // (math.prod(latents[0].shape[2:]) * geometry.factor**2))
        return max(1, sum(total <= room for total in accumulate(map(len, latents))))

    def _images(self, latents: F32) -> NDArray[np.uint8]:
        return np.ascontiguousarray(to_uint8(self._pipeline.backends["decoder"].run({"latents": latents})["image"]))

    def _failed(self, tickets: Sequence[Job], error: Exception) -> None:
        """End tickets with an error: their own, as that of a prompt that is no text, or the engine's."""
        if not isinstance(error, SpecError):
            self.broken = True
            _log.error("%d requests failed: %s: %s", len(tickets), type(error).__name__, error)
        if not isinstance(error, LdmError):
            error = BackendError(f"engine room: {type(error).__name__}: {error}")
        for ticket in tickets:
            self._tell(ticket, error)
