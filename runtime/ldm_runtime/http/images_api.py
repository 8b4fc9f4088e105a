"""OpenAI's images API: ``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/models``.

Fields and events follow https://platform.openai.com/docs/api-reference/images (read in 2026-11), with additional fields
for latent diffusion models (seed, steps, guidance, …).
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.http.api_error import ApiError
from ldm_runtime.http.image_request import ImageRequest, parse
from ldm_runtime.http.image_store import ImageStore
from ldm_runtime.http.request_body import form_fields, json_fields
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.http.server_options import ServerOptions
from ldm_runtime.http.submission import cancelled_on_disconnect, flag_of, result_of, seed_of, setting_of, submit, timing

__all__ = ["ImagesApi"]

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of event streams, so that no cache or proxy delays events."""
KEEP_ALIVE = 15.0
"""Seconds without an event after which a stream sends a comment, so that no proxy closes the connection."""


class ImagesApi:
    """Endpoints of OpenAI's images API.

    Args:
        models: The bundles; the first is the default.
        options: Limits.
        store: Keeps images that responses refer to by URL.
    """

    def __init__(self, models: ServedModels, options: ServerOptions, store: ImageStore):
        self._models, self._options, self._store = models, options, store

    def routes(self) -> list[Route]:
        """The routes of the API."""
        return [
            Route("/v1/models", self._list),
            Route("/v1/models/{name}", self._one),
            Route("/v1/images/generations", self._generations, methods=["POST"]),
            Route("/v1/images/edits", self._edits, methods=["POST"]),
            Route("/v1/images/files/{name}", self._file, name="file"),
        ]

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [one.facts() for one in self._models.bundles.values()]})

    async def _one(self, request: Request) -> Response:
        return JSONResponse(self._models.bundles[self._name(request.path_params["name"])].facts())

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"].partition(".")[0]
        if (found := self._store.get(name)) is None:
            raise ApiError(404, "file: there is no image of this name (any more)", code="not_found")
        return Response(found[0], media_type=found[1], headers={"X-Content-Type-Options": "nosniff"})

    async def _generations(self, request: Request) -> Response:
        fields = await json_fields(request)
        for name in ("image", "mask"):
            if name in fields:
                raise ApiError(400, f"{name}: send images to /v1/images/edits", code="invalid_value", param=name)
        return await self._images(request, fields, "image_generation")

    async def _edits(self, request: Request) -> Response:
        fields = await form_fields(request)
        if "image" not in fields:
            raise ApiError(400, "image: got none, expected an image file", code="invalid_value", param="image")
        return await self._images(request, fields, "image_edit")

    def _name(self, name: Any) -> str:
        if name is None:
            return self._models.names[0]
        if not isinstance(name, str) or name not in self._models.names:
            raise ApiError(
                404,
                f"model: got {name!r:.60}, expected one of {', '.join(self._models.names)}",
                code="model_not_found",
                param="model",
            )
        return name

    async def _images(self, request: Request, fields: Mapping[str, Any], event: str) -> Response:
        begun = time.monotonic()
        async with self._models.use(self._name(fields.get("model"))) as model:
            wanted = parse(fields, model, self._options)
            listener = _Listener(asyncio.get_running_loop())
            on_progress = listener.add if wanted.stream else None
            job = await submit(model, wanted, self._options, on_progress)
        request.state.model, request.state.images = model.name, job.plan.images
        if wanted.stream:
            job.future.add_done_callback(lambda future: listener.end())
            events = _Events(event, wanted, job)
            headers = {**STREAM_HEADERS, **timing(request, begun, job)}
            return StreamingResponse(events.stream(listener), media_type="text/event-stream", headers=headers)
        async with cancelled_on_disconnect(request, job):
            result = await result_of(job)
        headers = timing(request, begun, job)
        answer = await run_in_threadpool(self._answer, result, wanted, str(request.base_url))
        return JSONResponse({**answer, **setting_of(job)}, headers=headers)

    def _answer(self, result: JobResult, wanted: ImageRequest, base_url: str) -> dict[str, Any]:
        data = []
        for index, image in enumerate(result.images):
            encoded = wanted.format.encode(image)
            if wanted.as_url:
                name = self._store.add(encoded, wanted.format.media_type)
                entry = {"url": f"{base_url}v1/images/files/{name}.{wanted.format.name}"}
            else:
                entry = {"b64_json": base64.b64encode(encoded).decode()}
            data.append({**entry, "seed": seed_of(result, index), **flag_of(result, index)})
        return {"created": int(time.time()), "data": data, **_described(result.images.shape, wanted)}


class _Listener:
    """Passes progress from the scheduler's notifier thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self.steps = loop, asyncio.Queue[Progress | None]()

    def add(self, step: Progress) -> None:
        self._send(step)

    def end(self) -> None:
        self._send(None)

    def _send(self, step: Progress | None) -> None:
        with suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self.steps.put_nowait, step)


class _Events:
    """Writes a request as server-sent events.

    Args:
        name: "image_generation" or "image_edit", the prefix of the event types.
        wanted: The request.
        job: Its job.
    """

    def __init__(self, name: str, wanted: ImageRequest, job: Job):
        self._name, self._wanted, self._job = name, wanted, job

    async def stream(self, listener: _Listener) -> AsyncIterator[bytes]:
        """Yield the events. The request is cancelled if the client disconnects."""
        partial = 0
        try:
            if self._wanted.progress:
                yield _event("progress", {"step": 0, "total": len(self._job.plan.trajectory)})
            while True:
                try:
                    step = await asyncio.wait_for(listener.steps.get(), KEEP_ALIVE)
                except TimeoutError:
                    yield b": waiting\n\n"
                    continue
                if step is None:
                    break
                if self._wanted.progress:
                    yield _event("progress", {"step": step.index + 1, "total": step.total})
                if step.preview is not None and partial < self._wanted.partial_images and step.index + 1 < step.total:
                    yield await run_in_threadpool(self._partial, step, partial)
                    partial += 1
            result = await result_of(self._job)
            for index in range(len(result.images)):
                yield await run_in_threadpool(self._completed, result, index)
        except ApiError as error:
            yield _event("error", error.body())
        finally:
            self._job.cancel()

    def _partial(self, step: Progress, index: int) -> bytes:
        assert step.preview is not None
        facts = self._image(step.preview, 0)
        return _event(f"{self._name}.partial_image", {**facts, "partial_image_index": index})

    def _completed(self, result: JobResult, index: int) -> bytes:
        facts = self._image(result.images, index)
        facts |= {"usage": _USAGE, "index": index, "seed": seed_of(result, index), **flag_of(result, index)}
        facts |= setting_of(self._job)
        return _event(f"{self._name}.completed", facts)

    def _image(self, images: Any, index: int) -> dict[str, Any]:
        encoded = base64.b64encode(self._wanted.format.encode(images[index])).decode()
        return {"b64_json": encoded, "created_at": int(time.time()), **_described(images.shape, self._wanted)}


_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Token usage in events: zero, because nothing is billed."""


def _described(shape: tuple[int, ...], wanted: ImageRequest) -> dict[str, str]:
    size = f"{shape[2]}x{shape[1]}"
    return {"size": size, "output_format": wanted.format.name, "quality": "auto", "background": "opaque"}


def _event(kind: str, facts: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n".encode()
