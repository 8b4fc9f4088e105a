"""OpenTelemetry spans of requests, as its SDK exports them: stages, times, outcomes, and the caller's trace."""

from __future__ import annotations

import itertools
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from ldm_runtime import Request
from ldm_runtime.batching.job import REQUEST_STAGES
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import CancelledError
from tests.support.waiting import wait_until

CHILDREN = [f"ldm.{stage}" for stage in REQUEST_STAGES]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Receives the spans that end during the test."""
    memory, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield memory
    provider.shutdown()


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """The spans of one request by name; waits for them, because a result is sent before."""
    assert wait_until(lambda: any(span.name == "ldm.request" for span in exporter.get_finished_spans()))
    finished = exporter.get_finished_spans()
    assert len({span.name for span in finished}) == len(finished)
    return {span.name: span for span in finished}


def test_a_request_has_a_span_for_each_stage(scheduler: BatchScheduler, exporter: InMemorySpanExporter) -> None:
    scheduler.submit(Request(["a", "b"], seed=1, num_inference_steps=4, guidance_scale=6.0)).result(60)
    found = spans(exporter)
    assert list(found) == [*CHILDREN, "ldm.request"]
    whole = found["ldm.request"]
    assert dict(whole.attributes or {}) == {"ldm.images": 2, "ldm.rows": 4, "ldm.steps": 4, "ldm.outcome": "done"}
    assert whole.parent is None and whole.status.is_unset
    times = [(span.start_time or 0, span.end_time or 0) for span in (found[name] for name in CHILDREN)]
    assert times[0][0] == whole.start_time and times[-1][1] == whole.end_time
    assert all(ended == begun for (_, ended), (begun, _) in itertools.pairwise(times))
    assert all(begun <= ended for begun, ended in times)
    for name in CHILDREN:
        assert found[name].parent == whole.context
    assert "prompt" not in str([span.attributes for span in found.values()])


def test_a_request_that_is_cancelled_has_the_stages_that_it_reached(gated, exporter: InMemorySpanExporter) -> None:
    scheduler, gate = gated()
    job = scheduler.submit(Request("a", seed=1, num_inference_steps=4))
    gate.wait_for_call()
    job.cancel()
    gate.open()
    with pytest.raises(CancelledError):
        job.result(60)
    found = spans(exporter)
    assert list(found) == [*CHILDREN[:3], "ldm.request"]
    assert (found["ldm.request"].attributes or {})["ldm.outcome"] == "cancelled"


def test_spans_belong_to_the_trace_of_the_caller(scheduler: BatchScheduler, exporter: InMemorySpanExporter) -> None:
    with TracerProvider().get_tracer("caller").start_as_current_span("caller") as caller:
        job = scheduler.submit(Request("a", seed=1, num_inference_steps=1))
    job.result(60)
    whole = spans(exporter)["ldm.request"]
    assert whole.parent == caller.get_span_context() and whole.context.trace_id == caller.get_span_context().trace_id


def test_a_request_over_http_continues_its_trace(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    from tests.http.conftest import open_models, running
    from tests.support.small_bundle import write_small_bundle

    write_small_bundle(tmp_path / "plain")
    models = open_models([tmp_path / "plain"])
    try:
        with running(models) as server:
            headers = {"Content-Type": "application/json", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            address = f"{server.url}/v1/images/generations"
            urllib.request.urlopen(urllib.request.Request(address, b'{"steps": 1, "seed": 1}', headers)).read()
            whole = spans(exporter)["ldm.request"]
    finally:
        for model in models.values():
            model.close()
    assert whole.parent is not None
    assert (f"{whole.context.trace_id:032x}", f"{whole.parent.span_id:016x}") == (TRACE, PARENT)


def test_without_the_package_nothing_happens() -> None:
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from ldm_runtime import tracing\n"
        "from ldm_runtime.batching.spans import record_spans\n"
        "assert tracing.opentelemetry() is None and tracing.current_context() is None\n"
        "record_spans(None, 'done')\n"
        "with tracing.remote_context({}): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
