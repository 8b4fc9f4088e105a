"""A thread that tells callers, so that no callback of theirs delays a step."""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import InvalidStateError
from contextlib import suppress

from ldm_runtime.batching.job import Job, JobResult, Progress
from ldm_runtime.errors import LdmError

MOST_BEHIND = 1000
"""Progress is left out while so many messages wait, e.g. behind a callback that hangs; outcomes never are."""
_log = logging.getLogger(__name__)


class Notifier:
    """Delivers progress and outcomes in the order in which they were given."""

    def __init__(self) -> None:
        self._messages = queue.SimpleQueue[tuple[Job, Progress | JobResult | LdmError] | None]()
        self._thread = threading.Thread(target=self._run, name="ldm-notifier", daemon=True)
        self._thread.start()

    def tell(self, ticket: Job, message: Progress | JobResult | LdmError) -> None:
        """Deliver a message soon."""
        if not isinstance(message, Progress) or self._messages.qsize() < MOST_BEHIND:
            self._messages.put((ticket, message))

    def _run(self) -> None:
        while (entry := self._messages.get()) is not None:
            ticket, message = entry
            with suppress(InvalidStateError):  # a future that its caller has cancelled
                if isinstance(message, Progress):
                    self._progress(ticket, message)
                elif isinstance(message, JobResult):
                    ticket.future.set_result(message)
                else:
                    ticket.future.set_exception(message)

    def _progress(self, ticket: Job, message: Progress) -> None:
        if ticket.progress is None or ticket.future.done():
            return
        try:
            ticket.progress(message)
        except Exception:
            _log.exception("a progress callback failed; it is not called again")
            ticket.progress = None

    def close(self, timeout: float) -> None:
        """Deliver what waits, then end."""
        self._messages.put(None)
        self._thread.join(timeout)
