"""OpenTelemetry spans of a request: waiting, encoding, denoising steps and decoding.

Requests share UNet calls, so a span says when a request was in a stage, not how much work it caused. Spans are written
when the request ends, from the times recorded in its job. They do not contain prompts.
"""

from __future__ import annotations

import time

from ldm_runtime.batching.job import Job
from ldm_runtime.tracing import opentelemetry

__all__ = ["record_spans"]


def record_spans(job: Job, outcome: str) -> None:
    """Write the spans of a request that has just ended: ``ldm.request``, and ``ldm.queue`` and so on below it.

    Stages that it did not reach have no span.

    Args:
        job: The request.
        outcome: One of ``counters.OUTCOMES``.
    """
    package = opentelemetry()
    if package is None:
        return
    now, now_ns = time.monotonic(), time.time_ns()

    def epoch(moment: float) -> int:
        return now_ns - round((now - moment) * 1e9)

    tracer = package.trace.get_tracer("ldm_runtime")
    attributes = {
        "ldm.images": job.plan.images,
        "ldm.rows": job.plan.rows,
        "ldm.steps": len(job.plan.trajectory),
        "ldm.outcome": outcome,
    }
    whole = tracer.start_span("ldm.request", job.trace_context, attributes=attributes, start_time=epoch(job.submitted))
    parent = package.trace.set_span_in_context(whole, job.trace_context)
    for stage, begun, ended in job.stages(now):
        span = tracer.start_span(f"ldm.{stage}", parent, start_time=epoch(begun))
        span.end(epoch(ended))
    if outcome == "failed":
        whole.set_status(package.trace.StatusCode.ERROR)
    whole.end(now_ns)
