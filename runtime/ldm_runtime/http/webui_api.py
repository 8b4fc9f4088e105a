"""AUTOMATIC1111's API ``/sdapi/v1/…``: the part that front ends need to generate images from texts and images."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ldm_runtime import request as sampling
from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.errors import SpecError
from ldm_runtime.http.api_error import ApiError
from ldm_runtime.http.image_request import ImageRequest, parse
from ldm_runtime.http.request_body import json_fields
from ldm_runtime.http.served_model import ServedModel
from ldm_runtime.http.served_models import ServedModels
from ldm_runtime.http.server_options import ServerOptions
from ldm_runtime.http.submission import cancelled_on_disconnect, result_of, seed_of, submit
from ldm_runtime.http.webui_images import IMAGE_CHECKED, start_fields
from ldm_runtime.http.webui_request import AUTOMATIC, CHECKED, SAMPLERS, image_fields, invalid, renamed
from ldm_runtime.number_checks import shown

__all__ = ["WebuiApi"]

CHECKPOINT = "sd_model_checkpoint"
"""Name of the option that selects a model."""
Handler = Callable[[Request], Awaitable[Response]]


class _Steps:
    """Counts the finished steps of a request.

    Args:
        task: "txt2img" or "img2img".
    """

    def __init__(self, task: str) -> None:
        self.task, self.done = task, 0

    def add(self, step: Progress) -> None:
        """Record a step; called in the scheduler's notifier thread."""
        self.done = step.index + 1


class WebuiApi:
    """Endpoints of AUTOMATIC1111's API.

    As in the original, ``POST /sdapi/v1/options`` selects the model for all clients of this API. It does not affect the
    images API. A request can name another model in ``override_settings``.

    Args:
        models: The bundles; the first is selected.
        options: Limits.
    """

    def __init__(self, models: ServedModels, options: ServerOptions):
        self._models, self._options = models, options
        self._selected = models.names[0]
        self._running: dict[Job, _Steps] = {}

    def routes(self) -> list[Route]:
        """The routes of the API."""
        return [
            Route("/sdapi/v1/txt2img", _answered(self._txt2img), methods=["POST"]),
            Route("/sdapi/v1/img2img", _answered(self._img2img), methods=["POST"]),
            Route("/sdapi/v1/options", _answered(self._get_options)),
            Route("/sdapi/v1/options", _answered(self._set_options), methods=["POST"]),
            Route("/sdapi/v1/sd-models", _answered(self._list)),
            Route("/sdapi/v1/samplers", _answered(self._samplers)),
            Route("/sdapi/v1/schedulers", _answered(self._schedulers)),
            Route("/sdapi/v1/scripts", _answered(self._scripts)),
            Route("/sdapi/v1/progress", _answered(self._progress)),
        ]

    async def _txt2img(self, request: Request) -> Response:
        fields = await json_fields(request)
        if fields.get("init_images"):
            raise invalid("init_images", "got images; send them to /sdapi/v1/img2img")
        return await self._images(request, fields, {}, "txt2img")

    async def _img2img(self, request: Request) -> Response:
        fields = await json_fields(request)
        return await self._images(request, fields, await run_in_threadpool(start_fields, fields), "img2img")

    async def _images(self, request: Request, fields: Mapping[str, Any], start: dict[str, Any], task: str) -> Response:
        settings = fields.get("override_settings") or {}
        steps = _Steps(task)
        async with self._models.use(
            self._name(settings.get(CHECKPOINT) if isinstance(settings, dict) else settings)
        ) as model:
            translated = {**image_fields(fields, model), **start}
            with renamed():
                wanted = parse(translated, model, self._options)
                job = await submit(model, wanted, self._options, steps.add)
        request.state.model, request.state.images = model.name, job.plan.images
        self._running[job] = steps
        try:
            async with cancelled_on_disconnect(request, job):
                result = await result_of(job)
        finally:
            del self._running[job]
        return JSONResponse(await run_in_threadpool(_answer, fields, model, wanted, job, result))

    async def _get_options(self, request: Request) -> Response:
        return JSONResponse({CHECKPOINT: self._selected, "sd_checkpoint_hash": ""})

    async def _set_options(self, request: Request) -> Response:
        """Select a model; other options have no meaning here and are ignored."""
        self._selected = self._name((await json_fields(request)).get(CHECKPOINT))
        return JSONResponse(None)

    async def _list(self, request: Request) -> Response:
        facts = {"hash": None, "sha256": None, "config": None}
        return JSONResponse(
            [{"title": name, "model_name": name, "filename": name, **facts} for name in self._models.names]
        )

    async def _samplers(self, request: Request) -> Response:
        async with self._models.use(self._selected) as model:
            names = await run_in_threadpool(_possible, model)
        return JSONResponse([{"name": name, "aliases": [], "options": {}} for name in names])

    async def _schedulers(self, request: Request) -> Response:
        return JSONResponse([{"name": AUTOMATIC.lower(), "label": AUTOMATIC, "aliases": None}])

    async def _scripts(self, request: Request) -> Response:
        return JSONResponse({"txt2img": [], "img2img": []})

    async def _progress(self, request: Request) -> Response:
        """Report the progress of the oldest request that is not done."""
        running = dict(self._running)
        job = min(running, key=lambda one: one.submitted, default=None)
        done, total = (running[job].done, len(job.plan.trajectory)) if job else (0, 0)
        begun = job.started if job else None
        left = (time.monotonic() - begun) * (total - done) / done if begun is not None and done else 0.0
        state = {
            "skipped": False,
            "interrupted": False,
            "job": running[job].task if job else "",
            "job_count": len(running),
            "job_timestamp": "0",
            "job_no": 0,
            "sampling_step": done,
            "sampling_steps": total,
        }
        share = done / total if total else 0.0
        facts = {"progress": share, "eta_relative": left, "state": state, "current_image": None, "textinfo": None}
        return JSONResponse(facts)

    def _name(self, name: Any) -> str:
        """Check the name of a model; None means the selected model. Front ends append a hash in brackets."""
        if name is None:
            return self._selected
        known = name.partition(" [")[0] if isinstance(name, str) else ""
        if known not in self._models.names:
            raise invalid(CHECKPOINT, f"got {shown(name)}, expected one of {', '.join(self._models.names)}")
        return known


def _answered(handler: Handler) -> Handler:
    """Wrap a handler so that its errors have the form that clients of this API expect."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            response = error.response()
            body = {"error": error.code, "detail": str(error), "errors": str(error)}
            headers = {name: value for name, value in response.headers.items() if name == "retry-after"}
            return JSONResponse(body, error.status, headers)

    return answered


def _possible(model: ServedModel) -> tuple[str, ...]:
    """Names of the samplers that a model supports, its own scheduler first."""
    example = model.pipeline.example()

    def possible(name: str) -> bool:
        try:
            model.pipeline.plan(sampling.Request(**example, scheduler=SAMPLERS[name]))
        except SpecError:
            return False
        return True

    return (AUTOMATIC, *filter(possible, SAMPLERS))


def _answer(
    fields: Mapping[str, Any], model: ServedModel, wanted: ImageRequest, job: Job, result: JobResult
) -> dict[str, Any]:
    """The response: images in base64, the request, and a JSON text with the parameters that reproduce each image."""
    images = [base64.b64encode(wanted.format.encode(image)).decode() for image in result.images]
    plan, height, width = job.plan, *result.images.shape[1:3]
    seeds = [seed_of(result, index) for index in range(len(images))]
    prompt, negative = str(fields.get("prompt", "")), str(fields.get("negative_prompt") or "")
    sampler = fields.get("sampler_name") or fields.get("sampler_index") or AUTOMATIC
    asked = plan.request.num_inference_steps
    steps = model.pipeline.model.defaults.num_inference_steps if asked is None else asked
    facts = {
        "sampler_name": sampler,
        "cfg_scale": plan.guidance_scale,
        "steps": steps,
        "width": width,
        "height": height,
        "sd_model_name": model.name,
    }
    settings = f"Steps: {steps}, Sampler: {sampler}, CFG scale: {plan.guidance_scale:g}, Size: {width}x{height}"
    if plan.start_image is not None:
        facts["denoising_strength"] = plan.start_image.strength
        settings += f", Denoising strength: {plan.start_image.strength:g}"
    unwanted = f"\nNegative prompt: {negative}" if negative else ""
    info = {
        **facts,
        "prompt": prompt,
        "all_prompts": [prompt] * len(images),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(images),
        "seed": seeds[0],
        "all_seeds": seeds,
        "batch_size": fields.get("batch_size", 1),
        "index_of_first_image": 0,
        **({} if result.flagged is None else {"flagged": list(result.flagged)}),
        "infotexts": [f"{prompt}{unwanted}\n{settings}, Seed: {seed}" for seed in seeds],
    }
    checked = (*CHECKED, *IMAGE_CHECKED) if wanted.request.image is not None else CHECKED
    sent = images if fields.get("send_images", True) else []
    return {
        "images": sent,
        "parameters": {name: fields[name] for name in checked if name in fields},
        "info": json.dumps(info),
    }
