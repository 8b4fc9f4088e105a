"""The outer side of workers: processes that take turns, so that what is compared meets the machine in one state."""

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

LEAST_SECONDS, MOST_TIMES, PAUSE = 0.2, 200, 0.05
"""A timing repeats calls until it lasts this long, at most so often; the pause lets another worker's threads sleep."""

Facts = dict[str, Any]


class Worker:
    """A process of ``obeying``: ``facts`` has what it told when it had loaded.

    Raises:
        BackendError: it refuses its settings, or it ended.
    """

    def __init__(
        self, name: str, command: Sequence[str], settings: Facts, environment: Mapping[str, str] | None = None
    ):
        self.name, self._complaints = name, tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=environment,
            start_new_session=True,  # an interrupt is ours to handle
        )
        try:
            self.facts = self.ask(settings)
        except BaseException:
            self.close()
            raise

    def ask(self, command: Facts) -> Facts:
        """The answer to one command. Raises BackendError where it is an error, or none comes."""
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
        self._complaints.seek(0)
        last = next((line for line in reversed(self._complaints.read().splitlines()) if line.strip()), "")
        return f"ended with code {code}: {last[:300] or 'it said nothing'}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
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
    done: Callable[[], None] = lambda: None,
) -> list[list[Facts]]:
    """Let the workers take turns: each warms up once, then ``runs`` rounds, every round begun by another worker.

    Args:
        command: the round's number → what to do in it, the same for all workers; -1 is the warm-up. Without ``times``
            in it, calls are repeated until a timing lasts LEAST_SECONDS.
        done: called after every answer.

    Returns:
        The answers, a list for each worker.

    Raises:
        BackendError: a worker failed.
    """
    times = []
    for worker in workers:
        seconds = worker.ask(command(-1))["seconds"]
        if seconds < LEAST_SECONDS:  # the first call has costs of its own: count by the second
            seconds = worker.ask(command(-1))["seconds"]
        times.append(min(MOST_TIMES, math.ceil(LEAST_SECONDS / max(seconds, 1e-6))))
        done()
    answers: list[list[Facts]] = [[] for _ in workers]
    for number in range(runs):
        for turn in range(len(workers)):
            index = (number + turn) % len(workers)
            time.sleep(PAUSE)
            answers[index].append(workers[index].ask({"times": times[index], **command(number)}))
            done()
    return answers
