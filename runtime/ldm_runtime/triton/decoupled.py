"""The model `ldm_stream`: a batch scheduler in Triton, with a response for each step and the images in the last."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.bundle import Bundle
from ldm_runtime.errors import LdmError, QueueFullError, SpecError
from ldm_runtime.model import DENOISERS
from ldm_runtime.pipeline import LatentDiffusionPipeline
from ldm_runtime.pipeline_options import PipelineExtras
from ldm_runtime.triton.open_requests import OpenRequest, OpenRequests
from ldm_runtime.triton.parameters import PER_STEP, ModelParameters, bundle_folder
from ldm_runtime.triton.per_step import PerStepUNet
from ldm_runtime.triton.prometheus import MetricsExporter
from ldm_runtime.triton.request_tensors import parse_parameters, parse_request
from ldm_runtime.triton.response_files import ResponseFiles
from ldm_runtime.triton.response_tensors import progress_tensors, response_tensors
from ldm_runtime.triton.tensors import CANCEL, CHECK, ID

__all__ = ["DecoupledModel"]

DRAIN_SECONDS = 25.0
"""Seconds that running requests have to end when the model is unloaded; Triton itself waits for 30 seconds."""


class DecoupledModel:
    """A model of Triton's Python backend; ``pb`` is triton_python_backend_utils."""

    pb: Any

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the pipeline and generate a test image; a model that cannot generate one does not become ready.

        With the UNet in another model, the test image is generated after loading, when that model can be called.

        Raises:
            TritonModelException: The model cannot be loaded; one line.
        """
        parameters = ModelParameters.from_args(args)
        per_step = parameters.unet == PER_STEP
        try:
            bundle = Bundle.open(bundle_folder(args))
            self._pipeline = parameters.open_pipeline(bundle)
            pipeline = self._per_step(self._pipeline, bundle) if per_step else self._pipeline
            self._scheduler = BatchScheduler(pipeline, parameters.limits, warm_up=not per_step)
        except LdmError as error:
            raise self.pb.TritonModelException(str(error)) from None
        self._open, self._files = OpenRequests(), ResponseFiles()
        self._jobs: dict[str, Job] = {}
        self._metrics = MetricsExporter(self.pb, args, self._scheduler.snapshot)

    def _per_step(self, pipeline: LatentDiffusionPipeline, bundle: Bundle) -> LatentDiffusionPipeline:
        model = pipeline.model
        called = {name: PerStepUNet(self.pb, model.components[name]) for name in DENOISERS if name in model.components}
        backends = {**pipeline.backends, **called}
        extras = PipelineExtras(pipeline.choice, record=pipeline.record)
        return LatentDiffusionPipeline(model, backends, bundle.file, extras=extras)

    def execute(self, requests: list[Any]) -> None:
        """Accept requests; returns at once, the responses follow."""
        for each in requests:
            request = OpenRequest(each, self.pb)
            try:
                self._accept(request)
            except Exception as error:
                self._metrics.update()
                request.fail(error)

    def _accept(self, request: OpenRequest) -> None:
        options = parse_parameters(request.parameters)
        if CANCEL in options:
            job = self._jobs.get(str(options[CANCEL]))
            if job is None:
                raise SpecError("cancel: no such request; it has not arrived yet, or it is finished")
            job.cancel()
            return request.send({}, last=True)
        if CHECK in options:
            if not self._scheduler.ready:
                raise QueueFullError("batch scheduler: the engine fails or does not respond; try again later")
            return request.send({}, last=True)
        submission = parse_request(request.inputs)
        streams = bool(request.requested & {"STEP", "TOTAL"}) or submission.preview_every > 0
        job = self._scheduler.submit(
            submission.request,
            priority=submission.priority,
            timeout=submission.timeout,
            on_progress=(lambda progress: self._report(request, progress)) if streams else None,
            preview_every=submission.preview_every,
        )
        name = str(options.get(ID, ""))
        if name:  # from `ldm`, which reports when its caller has disconnected
            self._jobs[name] = job
        else:
            request.cancel = job.cancel
            self._open.add(request)
        steps = len(job.plan.trajectory)
        return job.future.add_done_callback(lambda future: self._finish(request, name, steps, future))

    def _report(self, request: OpenRequest, progress: Progress) -> None:
        if progress.index + 1 < progress.total:  # the response of the last step is the one with the images
            request.send(progress_tensors(progress, request.requested), last=False)

    def _finish(self, request: OpenRequest, name: str, steps: int, future: Future[JobResult]) -> None:
        self._jobs.pop(name, None)
        self._metrics.update()  # so that they count this request when its caller has the last response
        error = future.exception()
        if error is not None:
            return request.fail(error)
        tensors = response_tensors(future.result(), steps, request.requested)
        try:
            if self._files.expects(name):
                self._files.write(name, tensors)
                tensors = {}
        except OSError as full:
            return request.fail(full)
        return request.send(tensors, last=True)

    def finalize(self) -> None:
        """Finish the running requests within ``DRAIN_SECONDS`` and free everything."""
        self._scheduler.close(DRAIN_SECONDS)
        self._open.close()
        self._metrics.close()
        self._pipeline.close()
