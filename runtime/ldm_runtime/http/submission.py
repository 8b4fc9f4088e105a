"""Passes HTTP requests through the batch scheduler: limits of the server, cancellation, and results."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.errors import LdmError
from ldm_runtime.http.api_error import ApiError, api_error
from ldm_runtime.http.image_request import ImageRequest
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.http.server_options import ServerOptions

__all__ = ["cancelled_on_disconnect", "flag_of", "result_of", "seed_of", "setting_of", "submit", "timing"]

STARTED = re.compile(r"t=([0-9]{1,12}(?:\.[0-9]{1,9})?)")
"""The header ``X-Request-Start``: Unix time in seconds."""


async def submit(
    model: ServedModel,
    wanted: ImageRequest,
    options: ServerOptions,
    on_progress: Callable[[Progress], None] | None = None,
) -> Job:
    """Check the limits of the server and add a request to the model's queue. The job holds the model until it ends.

    Images of a request are converted in another thread. A request without images takes about a millisecond, less than
    the change of threads costs while an engine uses all cores.

    Args:
        model: The model, which the caller holds.
        wanted: The request. Previews are only generated for a stream.
        options: Limits.
        on_progress: Called after each step.

    Raises:
        ApiError: The request exceeds a limit, or the pipeline or the queue refuses it.
    """
    try:
        images, plan_of = wanted.request.image is not None, model.pipeline.plan
        plan = await run_in_threadpool(plan_of, wanted.request) if images else plan_of(wanted.request)
        pixels = plan.images * math.prod(plan.shape[2:]) * model.pipeline.geometry.factor**2
        limits = (
            ("n", plan.images, options.max_images, "images"),
            ("size", pixels, options.max_pixels, "pixels in all images"),
        )
        for name, got, most, what in limits:
            if got > most:
                message = f"{name}: got {got} {what}, expected at most {most}"
                raise ApiError(400, message, code="invalid_value", param=name)
        every = max(1, len(plan.trajectory) // (wanted.partial_images + 1)) if wanted.partial_images else 0
        job = model.scheduler.submit(
            plan,
            timeout=options.timeout,
            on_progress=on_progress,
            preview_every=every if wanted.stream else 0,
        )
        model.hold_for(job)
        return job
    except LdmError as error:
        raise api_error(error) from None


async def result_of(job: Job) -> JobResult:
    """Wait for the result of a job.

    Raises:
        ApiError: The job has failed.
    """
    try:
        return await asyncio.wrap_future(job.future)
    except LdmError as error:
        raise api_error(error) from None


def seed_of(result: JobResult, index: int) -> int:
    """The seed that reproduces an image: its own one if every image has a seed, else that of the whole request."""
    return result.seeds[index] if len(result.seeds) == len(result.images) else result.seeds[0]


def flag_of(result: JobResult, index: int) -> dict[str, bool]:
    """Field of a response that says whether the safety checker flagged an image; empty without a safety checker."""
    return {} if result.flagged is None else {"flagged": result.flagged[index]}


def setting_of(job: Job) -> dict[str, Any]:
    """Field of an answer: the measured setting that the request's budget has taken; empty without a budget."""
    return {} if job.plan.setting is None else {"setting": job.plan.setting.facts()}


def timing(request: HttpRequest, begun: float, job: Job) -> dict[str, str]:
    """The header ``Server-Timing``: milliseconds until the request was admitted and, when it has ended, in each stage.

    See https://www.w3.org/TR/server-timing. Browsers show it beside the request. "wait" is the time between the header
    ``X-Request-Start`` of a proxy ("t=" and Unix time in seconds, as nginx writes it) and ``begun``.

    Args:
        request: The HTTP request.
        begun: ``time.monotonic()`` when the server began to handle the request.
        job: Its job.
    """
    now = time.monotonic()
    seconds = {"admission": job.submitted - begun}
    if found := STARTED.fullmatch(request.headers.get("x-request-start", "")):
        seconds = {"wait": max(0.0, time.time() - (now - begun) - float(found[1])), **seconds}
    if job.future.done():
        seconds |= {stage: end - start for stage, start, end in job.stages(now)}
    return {"Server-Timing": ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in seconds.items())}


class cancelled_on_disconnect:
    """Context manager that cancels a job if the client disconnects while the block runs.

    Args:
        request: The HTTP request. Its body must have been read.
        job: Its job.
    """

    def __init__(self, request: HttpRequest, job: Job):
        self._request, self._job = request, job
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._job.cancel()

    async def __aexit__(self, *exception: object) -> None:
        assert self._task is not None
        self._task.cancel()
        self._job.cancel()
