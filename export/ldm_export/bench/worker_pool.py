"""Worker processes that take turns, so that all alternatives are timed under the same conditions of the machine."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from ldm_runtime.errors import BackendError

__all__ = ["Facts", "Worker", "rounds"]

MIN_SECONDS, MAX_TIMES, PAUSE = 0.2, 200, 0.05
"""Minimum seconds of a timing, which repeats calls; maximum number of calls; and seconds of a pause between timings, in
which the threads of other workers go to sleep."""

Facts = dict[str, Any]


class Worker:
    """A process that runs ``worker_process.serve_commands``. ``facts`` is what it reported after loading.

    Args:
        name: Name for messages.
        command: Command line of the process.
        settings: First command, with which it loads.
        environment: Environment variables; None inherits those of this process.

    Raises:
        BackendError: It refuses its settings, or it ended.
    """

    def __init__(
        self, name: str, command: Sequence[str], settings: Facts, environment: Mapping[str, str] | None = None
    ):
        self.name, self._stderr = name, tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
            start_new_session=True,  # so that an interrupt reaches this process only
        )
        try:
            self.facts = self.ask(settings)
        except BaseException:
            self.close()
            raise

    def ask(self, command: Facts) -> Facts:
        """Return the answer to one command.

        Raises:
            BackendError: The answer is an error, or the process ended.
        """
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise BackendError(f"{self.name}: the process that runs it {self._end()}")
        answer: Facts = json.loads(line)
        if "error" in answer:
            raise BackendError(f"{self.name}: {answer['error']}")
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "was killed, as the system does when memory runs out; run fewer at once, or a smaller batch"
        self._stderr.seek(0)
        last = next((line for line in reversed(self._stderr.read().splitlines()) if line.strip()), "")
        return f"ended with code {code}: {last[:300] or 'no message'}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            if stream:
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def rounds(
    workers: Sequence[Worker],
    command: Callable[[int], Facts],
    runs: int,
    on_answer: Callable[[], None] = lambda: None,
) -> list[list[Facts]]:
    """Time the workers in turns: a warm-up of each, then ``runs`` rounds. Each round starts with another worker.

    Args:
        workers: The workers.
        command: Returns the command for a round, the same for all workers; round -1 is the warm-up. If it has no
            ``times``, calls are repeated until a timing lasts ``MIN_SECONDS``.
        runs: Number of rounds.
        on_answer: Called after every answer.

    Returns:
        The answers, one list for each worker.

    Raises:
        BackendError: A worker failed.
    """
    times = []
    for worker in workers:
        seconds = worker.ask(command(-1))["seconds"]
        if seconds < MIN_SECONDS:  # the first call has extra costs, so the second one counts
            seconds = worker.ask(command(-1))["seconds"]
        times.append(min(MAX_TIMES, math.ceil(MIN_SECONDS / max(seconds, 1e-6))))
        on_answer()
    answers: list[list[Facts]] = [[] for _ in workers]
    for number in range(runs):
        for turn in range(len(workers)):
            index = (number + turn) % len(workers)
            time.sleep(PAUSE)
            answers[index].append(workers[index].ask({"times": times[index], **command(number)}))
            on_answer()
    return answers
