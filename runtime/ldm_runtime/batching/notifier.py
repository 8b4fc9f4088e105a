"""A thread that runs the callbacks of callers, so that a slow callback delays no denoising step."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import InvalidStateError
from contextlib import suppress

from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.errors import LdmError

__all__ = ["Notifier"]

MAX_PENDING = 1000
"""Maximum pending messages before progress is dropped, e.g. behind a blocked callback. Results are never dropped."""
_log = logging.getLogger(__name__)


class Notifier:
    """Delivers progress and results in the order of the calls to ``notify``."""

    def __init__(self) -> None:
        self._messages = queue.SimpleQueue[tuple[Job, Progress | JobResult | LdmError] | None]()
        self._thread = threading.Thread(target=self._run, name="ldm-notifier", daemon=True)
        self._thread.start()

    def notify(self, job: Job, message: Progress | JobResult | LdmError) -> None:
        """Queue a message for delivery; returns at once."""
        if not isinstance(message, Progress) or self._messages.qsize() < MAX_PENDING:
            self._messages.put((job, message))

    def _run(self) -> None:
        while (entry := self._messages.get()) is not None:
            try:
                self._deliver(*entry)
            except BaseException:  # also SystemExit and the like: the thread delivers the messages of all requests
                _log.exception("a callback of a request raised an error")

    def _deliver(self, job: Job, message: Progress | JobResult | LdmError) -> None:
        with suppress(InvalidStateError):  # the caller has cancelled the future itself
            if isinstance(message, Progress):
                self._progress(job, message)
            elif isinstance(message, JobResult):
                job.future.set_result(message)
            else:
                job.future.set_exception(message)

    def _progress(self, job: Job, message: Progress) -> None:
        if job.on_progress is None or job.future.done():
            return
        try:
            job.on_progress(message)
        except BaseException:
            _log.exception("on_progress raised an error; it is not called again for this request")
            job.on_progress = None

    def is_alive(self) -> bool:
        """True if messages are delivered."""
        return self._thread.is_alive()

    def close(self, timeout: float) -> None:
        """Deliver the pending messages, then end the thread; waits for ``timeout`` seconds at most."""
        self._messages.put(None)
        self._thread.join(timeout)
