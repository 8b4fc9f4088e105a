"""The model `ldm_stream`: an engine room behind Triton, which tells each step and sends the pictures last."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from ldm_runtime.batching.job import Job, JobResult
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import LdmError, QueueFullError
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.triton.open_requests import OpenRequest, OpenRequests
from ldm_runtime.triton.parameters import PER_STEP, Settings, version_folder
from ldm_runtime.triton.per_step import PerStepUNet
from ldm_runtime.triton.prometheus import MetricsExporter
from ldm_runtime.triton.response_files import ResponseFiles
from ldm_runtime.triton.tensors import CANCEL, CHECK, ID, answer, asked, parameters, told

DRAIN = 25.0
"""Seconds that running requests have to end when the model is unloaded; Triton itself waits for 30."""


class DecoupledModel:
    """As Triton's python backend calls it; ``pb`` is triton_python_backend_utils."""

    pb: Any

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the pipeline and make a first picture; a model that cannot is not ready.

        Raises:
            TritonModelException: in one line, why.
        """
        settings = Settings.of(args)
        try:
            self._pipeline = settings.open(version_folder(args))
            pipeline = self._per_step(self._pipeline) if settings.unet == PER_STEP else self._pipeline
            self._room = BatchScheduler(pipeline, settings.limits, prove=settings.unet != PER_STEP)
        except LdmError as error:
            raise self.pb.TritonModelException(str(error)) from None
        self._open, self._parcels = OpenRequests(), ResponseFiles()
        self._named: dict[str, Job] = {}
        self._meters = MetricsExporter(self.pb, args, self._room.figures)

    def _per_step(self, pipeline: LatentDiffusionPipeline) -> LatentDiffusionPipeline:
        backends = {**pipeline.backends, "unet": PerStepUNet(self.pb, pipeline.backends["unet"])}
        return LatentDiffusionPipeline(backends, pipeline.tokenizer, pipeline.scheduler)

    def execute(self, requests: list[Any]) -> None:
        """Let requests in; returns at once, the answers follow."""
        for each in requests:
            request = OpenRequest(each, self.pb)
            try:
                self._let_in(request)
            except Exception as error:
                request.fail(error)

    def _let_in(self, request: OpenRequest) -> None:
        options = parameters(request.parameters)
        if CANCEL in options:
            if ticket := self._named.get(str(options[CANCEL])):
                ticket.cancel()
            return request.send({}, last=True)
        if CHECK in options:
            if not self._room.ready:
                raise QueueFullError("engine room: the engine fails or hangs, no picture can be made now")
            return request.send({}, last=True)
        wish = asked(request.inputs)
        streams = bool(request.wanted & {"STEP", "TOTAL"}) or wish.preview_every > 0
        ticket = self._room.submit(
            wish.request,
            priority=wish.priority,
            seconds=wish.seconds,
            progress=(lambda step: self._tell(request, step)) if streams else None,
            preview_every=wish.preview_every,
        )
        name, steps = str(options.get(ID, "")), wish.request.num_inference_steps
        if name:  # of `ldm`, which tells when its caller has gone
            self._named[name] = ticket
        else:
            request.cancel = ticket.cancel
            self._open.add(request)
        return ticket.future.add_done_callback(lambda future: self._done(request, name, steps, future))

    def _tell(self, request: OpenRequest, step: Any) -> None:
        if step.index + 1 < step.total:  # the last step's answer is that with the pictures
            request.send(told(step, request.wanted), last=False)

    def _done(self, request: OpenRequest, name: str, steps: int, future: Future[JobResult]) -> None:
        self._named.pop(name, None)
        error = future.exception()
        if error is not None:
            return request.fail(error)
        tensors = answer(future.result(), steps, request.wanted)
        try:
            if self._parcels.awaited(name):
                self._parcels.fill(name, tensors)
                tensors = {}
        except OSError as full:
            return request.fail(full)
        return request.send(tensors, last=True)

    def finalize(self) -> None:
        """Finish what runs, within bounds, and free everything."""
        self._room.close(DRAIN)
        self._open.close()
        self._meters.close()
        self._pipeline.close()
