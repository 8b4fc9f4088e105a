"""Callbacks that raise: every request ends, and the threads of the batch scheduler live on."""

from __future__ import annotations

import threading

import pytest

from ldm_runtime import Request
from ldm_runtime.batching.scheduler import BatchScheduler
from ldm_runtime.errors import BackendError
from tests.support.waiting import wait_until

ERRORS = (ValueError, SystemExit, KeyboardInterrupt, GeneratorExit)


def raising(error):
    def callback(_):
        raise error("of a callback")

    return callback


@pytest.mark.parametrize("error", ERRORS)
def test_a_callback_that_raises_stops_no_request(error, scheduler) -> None:
    one = scheduler.submit(Request("a", seed=0, num_inference_steps=3), on_progress=raising(error))
    one.future.add_done_callback(raising(error))
    other = scheduler.submit(Request("a", seed=1, num_inference_steps=3))
    assert len(one.result(20).images) == len(other.result(20).images) == 1
    assert scheduler.ready
    assert len(scheduler.submit(Request("a", seed=2, num_inference_steps=1)).result(20).images) == 1


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("component", ["text_encoder", "unet", "decoder"])
def test_an_engine_that_raises_ends_its_requests_and_not_the_scheduler(component, error, pipeline, monkeypatch) -> None:
    with BatchScheduler(pipeline) as scheduler:
        failed = threading.Event()
        run = pipeline.backends[component].run

        def once(feed):
            if not failed.is_set():
                failed.set()
                raise error("of an engine")
            return run(feed)

        monkeypatch.setattr(pipeline.backends[component], "run", once)
        job = scheduler.submit(Request(f"{component} {error.__name__}", seed=0, num_inference_steps=2))
        with pytest.raises(BackendError, match=f"{error.__name__}: of an engine"):
            job.result(20)
        assert wait_until(lambda: scheduler.ready)
        assert len(scheduler.submit(Request("a", seed=2, num_inference_steps=1)).result(20).images) == 1


def test_it_is_not_ready_without_its_notifier(pipeline) -> None:
    with BatchScheduler(pipeline) as scheduler:
        assert scheduler.ready
        scheduler._notifier.close(10)
        assert not scheduler.ready


def test_it_is_not_ready_if_noise_cannot_be_generated(pipeline) -> None:
    scheduler = BatchScheduler(pipeline)
    scheduler._noise_executor.shutdown()
    with pytest.raises(BackendError, match="RuntimeError"):
        scheduler.submit(Request("a", seed=0, num_inference_steps=2, eta=1.0)).result(20)
    assert not scheduler.ready and not wait_until(lambda: scheduler.ready, 1.5)
    scheduler.close()
